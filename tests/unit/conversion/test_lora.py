import json

import pytest
import torch
from safetensors.torch import save_file

from megacogvx import draws
from megacogvx.conversion.convert import convert, merged_and_cast, open_parts
from megacogvx.conversion.part import ReadOptions
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.testing.drawn_checkpoint import tiny_parts

RANK, WIDTH = 3, 64
SIZES = {"transformer_blocks.0.attn1.to_k": (WIDTH, WIDTH), "transformer_blocks.1.ff.net.0.proj": (4 * WIDTH, WIDTH)}
PREFIX = "base_model.model."


def factors():
    """Return {module: (A, B)}."""
    return {
        module: (draws.normal((RANK, n), 1, module, 0), draws.normal((m, RANK), 1, module, 1))
        for module, (m, n) in SIZES.items()
    }


def write(folder, prefix=PREFIX, **config):
    """Write an adapter as PEFT saves it."""
    folder.mkdir()
    tensors = {}
    for module, (a, b) in factors().items():
        tensors |= {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", "use_dora": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merged_state(parts, root):
    """The transformer as diffusers would load it."""
    from megacogvx.conversion.safetensors_files import SafetensorsFiles

    files = SafetensorsFiles(convert({"transformer": parts["transformer"]}, "diffusers", root) / "transformer")
    return {name: files.read(name) for name in files.infos}


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (6 / 3**0.5, 6 / 3**0.5)),
        ({"alpha_pattern": {"to_k": 12}}, (4.0, 2.0)),
        ({"alpha_pattern": {"transformer_blocks.1.ff.net.0.proj": 1.5}}, (2.0, 0.5)),
    ],
)
def test_merged_weights_are_the_sum_and_nothing_else_changes(tmp_path, config, scales):
    adapter = write(tmp_path / "adapter", **config)
    before = merged_state(tiny_parts("5b"), tmp_path / "before")
    after = merged_state(merged_and_cast(tiny_parts("5b"), [adapter], 1.0, None), tmp_path / "after")
    pairs = zip(factors().items(), scales, strict=True)
    expected = {f"{module}.weight": scale * b @ a for (module, (a, b)), scale in pairs}
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor + expected.get(name, 0.0), rtol=0, atol=1e-5)
        assert torch.equal(after[name], tensor) == (name not in expected)


def test_a_file_of_diffusers_training_scripts_and_a_strength(tmp_path):
    tensors = {}
    for module, (a, b) in factors().items():
        tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
    file, name = tmp_path / "pytorch_lora_weights.safetensors", "blocks.1.mlp.fc1.weight"
    a, b = factors()["transformer_blocks.1.ff.net.0.proj"]
    before = tiny_parts("5b")["transformer"].tensors.read(name)

    save_file(tensors, file)
    plain = merged_and_cast(tiny_parts("5b"), [tmp_path], 0.5, None)["transformer"].tensors.read(name)
    torch.testing.assert_close(plain, before + 0.5 * b @ a, rtol=0, atol=1e-5)

    said = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 9})
    save_file(tensors, file, metadata={"lora_adapter_metadata": said})
    scaled = merged_and_cast(tiny_parts("5b"), [file], 1.0, None)["transformer"].tensors.read(name)
    torch.testing.assert_close(scaled, before + 3.0 * b @ a, rtol=0, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    parts = tiny_parts("5b")
    with pytest.raises(CheckpointError, match=r"use_dora=True; only plain LoRA"):
        merged_and_cast(parts, [write(tmp_path / "a", use_dora=True)], 1.0, None)
    with pytest.raises(CheckpointError, match="says rank 4 for transformer_blocks"):
        merged_and_cast(parts, [write(tmp_path / "b", r=4)], 1.0, None)
    with pytest.raises(CheckpointError, match=r"2 modules are no linear layers here \(unet\.transformer_blocks"):
        merged_and_cast(parts, [write(tmp_path / "c", prefix="unet.")], 1.0, None)
    with pytest.raises(CheckpointError, match="is no LoRA adapter"):
        merged_and_cast(parts, [tmp_path], 1.0, None)
    half = write(tmp_path / "d")
    save_file({f"{PREFIX}x.lora_A.weight": torch.ones(2, 2)}, half / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 modules with one factor \(x\)"):
        merged_and_cast(parts, [half], 1.0, None)
    with pytest.raises(ConfigError, match="needs a transformer"):
        merged_and_cast({"vae": parts["vae"]}, [half], 1.0, None)


def test_an_adapter_of_another_width_is_refused(tmp_path):
    adapter = write(tmp_path / "a")
    save_file(
        {f"{PREFIX}proj_out.lora_A.weight": torch.ones(3, 5), f"{PREFIX}proj_out.lora_B.weight": torch.ones(7, 3)},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"proj_out is \(7, 5\), not \(16, 64\)"):
        merged_and_cast(tiny_parts("5b"), [adapter], 1.0, None)


def test_adapters_and_dtype_go_together(tmp_path):
    folder = convert(tiny_parts("5b"), "diffusers", tmp_path / "model", check=False)
    parts = merged_and_cast(open_parts([folder], ReadOptions()), [write(tmp_path / "adapter")], 1.0, "bf16")
    written = open_parts([convert(parts, "sat", tmp_path / "out")], ReadOptions())["transformer"].tensors
    merged = merged_and_cast(tiny_parts("5b"), [tmp_path / "adapter"], 1.0, None)["transformer"].tensors
    for name in ("blocks.0.attention.qkv.weight", "blocks.1.mlp.fc1.weight"):
        assert torch.equal(written.read(name), merged.read(name).bfloat16())
