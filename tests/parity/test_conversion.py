"""Checkpoints of all formats: what diffusers saves, what SAT's names are, and the way between them, bit for bit.

The way from SAT's names to diffusers' is written here a second time, after the description of SAT's own converter
(CogVideo `tools/convert_weight_sat2hf.py`), so that both can't be wrong in the same way.
"""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

from megacogvx import draws
from megacogvx.conversion.convert import convert, open_parts
from megacogvx.conversion.part import ReadOptions
from megacogvx.conversion.sat import PREFIX

SMALL = {
    "num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 20,
    "max_text_seq_length": 6, "sample_height": 4, "sample_width": 6, "sample_frames": 5, "out_channels": 4,
}  # fmt: skip
ROTARY = {"use_rotary_positional_embeddings": True}
V1_5 = {**ROTARY, "patch_size_t": 2, "patch_bias": False}
VARIANTS = {
    "2b": {"in_channels": 4},
    "5b": {"in_channels": 4, **ROTARY},
    "5b-i2v": {"in_channels": 8, **ROTARY, "use_learned_positional_embeddings": True},
    "1.5-5b": {"in_channels": 4, **V1_5},
    "1.5-5b-i2v": {"in_channels": 8, **V1_5, "ofs_embed_dim": 20},
}
VAE = {
    "block_out_channels": (4, 8, 8, 12), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PUBLISHED_SCALE = {"2b": (1.15258426, 3.0)}


def random_state(model, seed=0):
    """Random numbers in every tensor that a state dict has, buffers included."""
    return {
        name: draws.normal(tuple(tensor.shape), seed, name).to(tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def diffusers_folder(root, variant, dtype=torch.float32, with_vae=True):
    """A folder as diffusers itself saves it; returns the state dict of each model."""
    scale, shift = PUBLISHED_SCALE.get(variant, (0.7, 1.0))
    models = {"transformer": CogVideoXTransformer3DModel(**{**SMALL, **VARIANTS[variant]})}
    if with_vae:
        models["vae"] = AutoencoderKLCogVideoX(
            **VAE, scaling_factor=scale, invert_scale_latents=variant == "1.5-5b-i2v"
        )
    for name, model in models.items():
        model.load_state_dict(random_state(model))
        model.to(dtype).save_pretrained(root / name)
    scheduler_folder(root, shift)
    return {name: model.state_dict() for name, model in models.items()}


def scheduler_folder(root, snr_shift, **settings):
    from diffusers import CogVideoXDDIMScheduler

    CogVideoXDDIMScheduler(
        snr_shift_scale=snr_shift, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=True, **settings,
    ).save_pretrained(root / "scheduler")  # fmt: skip


def sat_to_diffusers(name, tensor):
    """Return what the official converter makes of one tensor of SAT's transformer: [(name, tensor)]."""
    parts = name.split(".")
    if "query_key_value" in name:
        kind = parts[-1]
        return [
            (f"transformer_blocks.{parts[2]}.attn1.to_{letter}.{kind}", third)
            for letter, third in zip("qkv", tensor.chunk(3), strict=True)
        ]
    if "adaLN_modulations" in name:
        layer, kind = parts[3], parts[-1]
        c = tensor.chunk(12)
        return [
            (f"transformer_blocks.{layer}.norm1.linear.{kind}", torch.cat([*c[0:3], *c[6:9]])),
            (f"transformer_blocks.{layer}.norm2.linear.{kind}", torch.cat([*c[3:6], *c[9:12]])),
        ]
    for letter, word in (("q", "query"), ("k", "key")):
        if f"{word}_layernorm_list" in name:
            return [(f"transformer_blocks.{parts[3]}.attn1.norm_{letter}.{parts[-1]}", tensor)]
    for old, new in {
        "transformer.layers": "transformer_blocks", "input_layernorm": "norm1.norm",
        "post_attention_layernorm": "norm2.norm", "attention.dense": "attn1.to_out.0",
        "mlp.dense_h_to_4h": "ff.net.0.proj", "mlp.dense_4h_to_h": "ff.net.2",
        "transformer.final_layernorm": "norm_final", "mixins.final_layer.norm_final": "norm_out.norm",
        "mixins.final_layer.adaLN_modulation.1": "norm_out.linear", "mixins.final_layer.linear": "proj_out",
        "mixins.patch_embed": "patch_embed", "mixins.pos_embed.pos_embedding": "patch_embed.pos_embedding",
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "ofs_embed.0": "ofs_embedding.linear_1", "ofs_embed.2": "ofs_embedding.linear_2",
    }.items():  # fmt: skip
        name = name.replace(old, new)
    return [(name, tensor)]


def sat_vae_to_diffusers(name):
    """The same for a name of the VAE: the decoder's stages are counted the other way round."""
    for side, levels in (("encoder.down", range(4)), ("decoder.up", range(4))):
        for level in levels:
            to = level if side == "encoder.down" else 3 - level
            name = name.replace(f"{side}.{level}.block.", f"{side}_blocks.{to}.resnets.")
            name = name.replace(f"{side}.{level}.{side[8:]}sample.", f"{side}_blocks.{to}.{side[8:]}samplers.0.")
    name = name.replace("mid.block_1.", "mid_block.resnets.0.").replace("mid.block_2.", "mid_block.resnets.1.")
    return name.replace("nin_shortcut", "conv_shortcut")


def load_folder(folder):
    """All tensors of a folder with safetensors, by the library itself."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def through(source, to, output, **options):
    """Convert once more, with nothing known but the folder, and return the output."""
    return convert(open_parts([source], ReadOptions()), to, output, **options)


QUICK = {*((variant, "fp32") for variant in VARIANTS), ("2b", "fp16"), ("1.5-5b", "bf16")}
CASES = [
    pytest.param(variant, dtype, (variant, dtype) not in QUICK or (variant, dtype) == ("2b", "fp32"),
                 marks=[] if (variant, dtype) in QUICK else pytest.mark.slow)
    for variant in VARIANTS for dtype in DTYPES
]  # fmt: skip


@pytest.mark.parametrize(("variant", "dtype", "with_vae"), CASES)
def test_every_way_round_gives_the_same_bits(tmp_path, variant, dtype, with_vae):
    truth = diffusers_folder(tmp_path / "source", variant, DTYPES[dtype], with_vae)
    ours = through(tmp_path / "source", "megacogvx", tmp_path / "ours", check=False)
    sat = through(ours, "sat", tmp_path / "sat", check=False)
    sharded = through(sat, "diffusers", tmp_path / "sharded", max_shard_bytes=20_000)
    ours_again = through(sat, "megacogvx", tmp_path / "ours2")
    back = through(ours_again, "diffusers", tmp_path / "back", check=False)
    sat_again = through(sharded, "sat", tmp_path / "sat2")

    settings = open_parts([tmp_path / "source"], ReadOptions())["transformer"].settings
    for end in (sharded, back):
        for kind, state in truth.items():
            same(load_folder(end / kind), state)
        assert open_parts([end], ReadOptions())["transformer"].settings == settings
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    files = [torch.load(folder / "transformer/1/mp_rank_00_model_states.pt")["module"] for folder in (sat, sat_again)]
    same(*files)
    same(as_diffusers(files[0], variant), truth["transformer"])
    if with_vae:
        state = torch.load(sat / "vae" / "3d-vae.pt")["state_dict"]
        same({sat_vae_to_diffusers(name): tensor for name, tensor in state.items()}, truth["vae"])


def as_diffusers(state, variant):
    """Read SAT's file as its own converter does."""
    found = {}
    for name, tensor in state.items():
        assert name.startswith(PREFIX)
        found |= dict(sat_to_diffusers(name.removeprefix(PREFIX), tensor))
    if variant == "2b":  # computed, not learned: diffusers doesn't keep it
        table = found.pop("patch_embed.pos_embedding")
        model = CogVideoXTransformer3DModel(**{**SMALL, **VARIANTS["2b"]})
        expected = model.patch_embed.pos_embedding.float().to(table.dtype)
        torch.testing.assert_close(table, expected, atol=1e-6 if table.dtype == torch.float32 else 0, rtol=0)
    return found
