"""Options and bad input of `convert`: what is refused, in which words, and before anything is written."""

import dataclasses
import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megacogvx.cli import main
from megacogvx.conversion.convert import agreeing, convert, merged_and_cast, open_parts, shard_bytes
from megacogvx.conversion.part import ReadOptions
from megacogvx.conversion.sat import PREFIX, STATES
from megacogvx.conversion.settings import VAESettings
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.testing.drawn_checkpoint import tiny_parts

SAT_FILE = f"transformer/1/{STATES}"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny model in all three formats."""
    root = tmp_path_factory.mktemp("formats")
    parts = tiny_parts("5b")
    return {to: convert(parts, to, root / to, check=False) for to in ("diffusers", "sat", "megacogvx")}


def opened(path, **options):
    return open_parts([path], ReadOptions(**options))


def copied(folders, name, tmp_path):
    return shutil.copytree(folders[name], tmp_path / name)


def change_sat(folder, change):
    file = folder / SAT_FILE
    content = torch.load(file)
    change(content["module"])
    torch.save(content, file)


def equal(parts, others):
    for kind, part in parts.items():
        assert part.tensors.infos == others[kind].tensors.infos
        for name in part.tensors.infos:
            assert torch.equal(part.tensors.read(name), others[kind].tensors.read(name)), name


def test_the_command_line_converts(folders, tmp_path):
    out = tmp_path / "out"
    assert main(["convert", str(folders["sat"]), "--to", "diffusers", "--output", str(out), "--dtype", "bf16"]) == 0
    equal(opened(out), merged_and_cast(opened(folders["diffusers"]), [], 1.0, "bf16"))
    assert main(["convert", str(folders["sat"]), "--to", "diffusers", "--output", str(out)]) == 2  # it is there


def test_parts_of_several_sources_are_put_together(folders, tmp_path):
    mixed = open_parts([folders["sat"] / "transformer", folders["diffusers"] / "vae"], ReadOptions())
    assert set(mixed) == {"transformer", "vae"}
    with pytest.raises(ConfigError, match="both hold a vae; name one"):
        open_parts([folders["sat"], folders["diffusers"] / "vae"], ReadOptions())


def test_the_vae_takes_the_scale_of_the_transformer(tmp_path):
    parts = {"transformer": tiny_parts("2b")["transformer"], "vae": tiny_parts("5b")["vae"]}
    convert({"transformer": parts["transformer"]}, "megacogvx", tmp_path / "a", check=False)
    convert({"vae": parts["vae"]}, "megacogvx", tmp_path / "b", check=False)
    both = open_parts([tmp_path / "a", tmp_path / "b"], ReadOptions())
    convert(both, "diffusers", tmp_path / "c", check=False)
    assert json.loads((tmp_path / "c" / "vae" / "config.json").read_text())["scaling_factor"] == 1.15258426


def test_conventions_travel_to_the_other_end_and_back(folders, tmp_path):
    for name, folder in folders.items():
        settings = opened(folder)["transformer"].settings
        assert settings == tiny_parts("5b")["transformer"].settings, name
    scheduler = json.loads((folders["diffusers"] / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["snr_shift_scale"]) == ("CogVideoXDPMScheduler", 1.0)


def test_without_our_file_a_diffusers_folder_means_what_its_pipelines_do(folders, tmp_path):
    folder = copied(folders, "diffusers", tmp_path)
    (folder / "transformer" / "megacogvx.json").unlink()
    settings = opened(folder)["transformer"].settings
    assert settings.model.rope_grid == "crop"
    assert settings.conventions.unconditional_text == "empty"
    assert settings.conventions.repeated_frames == "predicted"
    assert settings.encoder.text_length == 226


def test_what_a_format_cannot_hold_is_said(folders, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megacogvx"), "propagate", True)
    convert(opened(folders["megacogvx"]), "diffusers", tmp_path / "out", check=False)
    assert "diffusers can't hold model.rope_grid=slice" in caplog.text
    assert "diffusers can't hold conventions.unconditional_text=zeros" in caplog.text


@pytest.mark.parametrize("name", ["sat", "diffusers"])
def test_missing_and_left_over_tensors_are_named(folders, tmp_path, name):
    folder = copied(folders, name, tmp_path)
    if name == "sat":

        def change(module):
            del module[PREFIX + "mixins.final_layer.linear.bias"]
            module[PREFIX + "mixins.something.weight"] = torch.zeros(3)
            module[PREFIX + "time_embed.0.weight"] = torch.zeros(5, 5)

        change_sat(folder, change)
        names = ("mixins.final_layer.linear.bias", "mixins.something.weight", "time_embed.0.weight")
    else:
        file = folder / "transformer" / DIFFUSERS_FILE
        tensors = load_file(file)
        del tensors["proj_out.bias"]
        tensors["something.weight"], tensors["time_embedding.linear_1.weight"] = torch.zeros(3), torch.zeros(5, 5)
        save_file(tensors, file)
        names = ("proj_out.bias", "something.weight", "time_embedding.linear_1.weight")
    with pytest.raises(CheckpointError) as error:
        opened(folder)
    missing, left_over, differing = names
    assert f"1 missing: {missing}; 1 left over: {left_over}; 1 of another shape: {differing} is (5, 5)" in str(
        error.value
    )


def test_another_variants_config_is_refused(folders, tmp_path):
    folder = copied(folders, "diffusers", tmp_path)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 3, "in_channels": 8}))
    with pytest.raises(CheckpointError, match=r"24 missing: transformer_blocks\.2.*patch_embed.proj.weight is"):
        opened(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"activation_fn": "relu"}))
    with pytest.raises(CheckpointError, match=r"activation_fn='relu' \(only 'gelu-approximate' is supported\)"):
        opened(folder)


def test_another_schedule_is_refused(folders, tmp_path):
    folder = copied(folders, "diffusers", tmp_path)
    file = folder / "scheduler" / "scheduler_config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"prediction_type": "epsilon"}))
    with pytest.raises(CheckpointError, match="prediction_type='epsilon'"):
        opened(folder)
    file.write_text(json.dumps(before | {"_class_name": "EulerDiscreteScheduler"}))
    with pytest.raises(CheckpointError, match="'EulerDiscreteScheduler' is unknown"):
        opened(folder)


def test_a_trained_file_with_foreign_tensors_works_when_asked_to(folders, tmp_path):
    folder = copied(folders, "sat", tmp_path)
    foreign = {"first_stage_model.encoder.weight": torch.ones(2), "conditioner.embedders.0.weight": torch.ones(3)}
    ignored = {
        PREFIX + "transformer.word_embeddings.weight": torch.ones(1, 1),
        PREFIX + "mixins.pos_embed.freqs_sin": torch.ones(2),
    }
    change_sat(folder, lambda module: module.update(foreign | ignored))
    with pytest.raises(CheckpointError, match=r"2 tensors of other models: first_stage_model.*--drop-foreign"):
        opened(folder)
    equal(opened(folder, drop_foreign=True), opened(folders["diffusers"]))


def test_an_unknown_sat_file_wants_its_settings(folders, tmp_path):
    folder = copied(folders, "sat", tmp_path)
    (folder / "transformer" / "megacogvx.json").unlink()
    with pytest.raises(ConfigError, match=r"none of the released models \(2b, 5b.*--config"):
        opened(folder)
    with pytest.raises(CheckpointError, match=r"does not hold the transformer of 42 layers.*missing.*of another shape"):
        opened(folder, variant="5b")
    config = folders["megacogvx"] / "transformer" / "checkpoints" / "step-00000000" / "config.yaml"
    assert opened(folder, config=config)["transformer"].settings == opened(folders["sat"])["transformer"].settings


def test_a_vae_alone_wants_its_scale(folders, tmp_path):
    folder = copied(folders, "sat", tmp_path)
    (folder / "vae" / "megacogvx.json").unlink()
    settings = {"block_out_channels": [4, 8, 8, 12], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
    (tmp_path / "vae.yaml").write_text(json.dumps({"vae": {**settings, "scaling_factor": 0.7}}))
    with pytest.raises(CheckpointError, match="does not hold the VAE with block_out_channels"):
        opened(folder / "vae")
    vae = opened(folder / "vae", config=tmp_path / "vae.yaml")["vae"]
    assert vae.settings.vae.scaling_factor == 0.7
    silent = dataclasses.replace(vae, knows_scale=False)
    with pytest.raises(ConfigError, match=r"doesn't say what its latents are multiplied by; .* --variant"):
        agreeing({"vae": silent})
    transformer = opened(folder / "transformer")["transformer"]
    assert agreeing({"vae": silent, "transformer": transformer})["vae"].settings.vae.scaling_factor == 0.7


def test_models_that_do_not_belong_together_are_refused(folders):
    parts = opened(folders["sat"])
    other = VAESettings(parts["vae"].settings.vae.model_copy(update={"latent_channels": 8}))
    with pytest.raises(ConfigError, match=r"model.out_channels=4 .* has 8; they don't belong together"):
        agreeing({**parts, "vae": dataclasses.replace(parts["vae"], settings=other)})


def test_averaged_weights_are_taken_when_named(folders, tmp_path):
    folder = copied(folders, "sat", tmp_path)
    average = folder / "transformer" / "1-ema"
    average.mkdir()
    content = torch.load(folder / SAT_FILE)
    content["module"] = {name: tensor + 1 for name, tensor in content["module"].items()}
    torch.save(content, average / STATES)
    live = opened(folder / "transformer")["transformer"].tensors
    kept = opened(folder / "transformer", weights="ema")["transformer"].tensors
    assert torch.equal(kept.read("head.proj.bias"), live.read("head.proj.bias") + 1)
    with pytest.raises(CheckpointError, match=r"no weights 'best'; folders with weights: 1, 1-ema"):
        opened(folder / "transformer", weights="best")
    with pytest.raises(ConfigError, match="holds one set of weights"):
        opened(folders["diffusers"], weights="ema")
    both = open_parts([folder / "transformer", folders["diffusers"] / "vae"], ReadOptions(weights="ema"))
    assert torch.equal(both["transformer"].tensors.read("head.proj.bias"), kept.read("head.proj.bias"))
    with pytest.raises(CheckpointError, match=r"no weights 'ema'; it has model"):
        opened(folders["megacogvx"], weights="ema")


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_file_is_not_run(folders, tmp_path):
    folder, marker = copied(folders, "sat", tmp_path), tmp_path / "marker"
    content = torch.load(folder / SAT_FILE)
    torch.save({**content, "args": Hostile(marker)}, folder / SAT_FILE)
    with pytest.raises(CheckpointError, match=r"objects other than tensors and plain values \(posix.system\)"):
        opened(folder)
    assert not marker.exists()


@pytest.mark.parametrize("place", [SAT_FILE, "vae/3d-vae.pt", f"transformer/{DIFFUSERS_FILE}"])
def test_a_truncated_or_foreign_file_is_refused(folders, tmp_path, place):
    folder = copied(folders, "diffusers" if place.endswith("safetensors") else "sat", tmp_path)
    file = folder / place
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"not a checkpoint", data[:-1000]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=file.name):
            opened(folder)


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        opened(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint that is known here"):
        opened(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="'StableDiffusionPipeline', and no CogVideoX pipeline"):
        opened(tmp_path)


def test_what_fp16_cannot_hold_is_refused(folders):
    parts = tiny_parts("5b")
    part = merged_and_cast(parts, [], 1.0, "fp16")["transformer"]
    part.tensors._source.read = lambda name: torch.full((3,), 1e5)
    with pytest.raises(CheckpointError, match=r"too large for torch.float16; convert to bf16 or fp32"):
        part.tensors.read("head.proj.bias")


def test_an_ablation_has_no_published_names(folders, tmp_path):
    part = opened(folders["megacogvx"])["transformer"]
    model = part.settings.model.model_copy(update={"attention": "2d_1d"})
    part = dataclasses.replace(part, settings=dataclasses.replace(part.settings, model=model))
    for to in ("diffusers", "sat"):
        with pytest.raises(ConfigError, match="attention=2d_1d: an ablation"):
            convert({"transformer": part}, to, tmp_path / "out")


def test_nothing_is_left_of_a_conversion_that_fails(folders, tmp_path):
    parts = opened(folders["diffusers"])
    read = parts["vae"].tensors.read

    def fail(name):
        if name == "decoder.conv_out.bias":
            raise CheckpointError("the disk is gone")
        return read(name)

    parts["vae"].tensors.read = fail
    for to in folders:
        with pytest.raises(CheckpointError, match="the disk is gone"):
            convert(parts, to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_back(folders, tmp_path, monkeypatch):
    from megacogvx.conversion import safetensors_files

    original = safetensors_files.raw_bytes

    def flipped(tensor):
        data = bytearray(original(tensor))
        data[0] ^= 1
        return data

    monkeypatch.setattr(safetensors_files, "raw_bytes", flipped)
    with pytest.raises(CheckpointError, match="was read back with other values"):
        convert(opened(folders["diffusers"]), "diffusers", tmp_path / "out")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("100KB", 100_000)])
def test_sizes(text, size):
    assert shard_bytes(text) == size


@pytest.mark.parametrize("text", ["", "5", "0GB", "-1GB", "5 apples"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="write it like 5GB"):
        shard_bytes(text)
