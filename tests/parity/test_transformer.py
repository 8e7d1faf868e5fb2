"""The transformer equals diffusers' CogVideoXTransformer3DModel with the same weights: all five published variants.

Samples of several sizes go through ours as one pack, padding at its end, and through diffusers one by one; outputs and
the gradient of every parameter are compared in fp32.
"""

import dataclasses
import inspect

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from megacogvx import draws
from megacogvx.models.transformer import (
    PRESETS,
    CogVideoXConfig,
    CogVideoXTransformer,
    place_on_rope_grid,
    transformer_core,
)
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.patches import patchify
from megacogvx.testing.published_names import to_our_names
from megacogvx.testing.tolerance import assert_all_close, assert_close

OUTPUT_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
TEXT = 6  # text tokens of a full caption
SMALL = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    "max_text_seq_length": TEXT, "sample_height": 8, "sample_width": 12, "sample_frames": 9, "out_channels": 4,
    "norm_eps": 1e-3, "final_norm_eps": 1e-3,  # large enough to be seen if one stood in a wrong place
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published variant in small: settings beside `SMALL`, and (T, H, W, text tokens) of each sample."""

    ours: dict
    sizes: tuple[tuple[int, int, int, int], ...]


SIZES = ((3, 8, 12, TEXT), (1, 4, 6, 3), (2, 6, 16, 5), (1, 8, 8, TEXT))  # wide, wider and square
FULL_TEXT = tuple((t, h, w, TEXT) for t, h, w, _ in SIZES)  # additive positions know one text length in diffusers
ROTARY = {"use_rotary_positional_embeddings": True}
VARIANTS = {
    "2b": Variant({"in_channels": 4}, FULL_TEXT),
    "5b": Variant({"in_channels": 4, **ROTARY, "sample_width": 16}, SIZES),
    "5b_crop": Variant({"in_channels": 4, **ROTARY, "rope_grid": "crop"}, SIZES),
    "5b_i2v": Variant(
        {"in_channels": 8, **ROTARY, "use_learned_positional_embeddings": True},
        ((3, 8, 12, TEXT), (1, 8, 12, TEXT), (2, 8, 12, TEXT)),
    ),
    "1_5": Variant(
        {"in_channels": 4, **ROTARY, "patch_size_t": 2, "sample_width": 16},
        ((4, 8, 12, TEXT), (1, 6, 6, 3), (5, 6, 16, 5)),
    ),
    "patch_of_four_frames": Variant(
        {"in_channels": 4, **ROTARY, "patch_size_t": 4, "sample_width": 16},
        ((4, 8, 12, TEXT), (1, 4, 6, 3), (6, 6, 16, 5), (7, 6, 6, 2)),
    ),
    "1_5_i2v": Variant(
        {"in_channels": 8, **ROTARY, "patch_size_t": 2, "ofs_embed_dim": 32},
        ((4, 8, 12, TEXT), (3, 6, 6, 5), (1, 4, 6, 3)),
    ),
}


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


@pytest.mark.parametrize("name", VARIANTS)
def test_pack_equals_diffusers_sample_by_sample(name, groups):
    variant = VARIANTS[name]
    config = CogVideoXConfig(**{**SMALL, **variant.ours})
    theirs = _diffusers_model(config)
    ours = _our_model(config, groups)
    ours.load_state_dict(to_our_names(theirs.state_dict(), config))
    samples = [_inputs(config, place, *size) for place, size in enumerate(variant.sizes)]

    expected = [_run_diffusers(theirs, config, *sample) for sample in samples]
    actual, layout = _run_pack(ours, config, samples)

    for place, (mine, reference) in enumerate(zip(actual, expected, strict=True)):
        assert_close(mine, reference, OUTPUT_BOUND, f"output of sample {place}, {variant.sizes[place]}")
    for place, (mine, reference) in enumerate(zip(actual, expected, strict=True)):
        cotangent = draws.normal(tuple(reference.shape), 0, "cotangent", place)
        (reference * cotangent).sum().backward()
        (mine * cotangent).sum().backward(retain_graph=True)
    references = to_our_names({name: p.grad for name, p in theirs.named_parameters()}, config)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    if name == "2b":
        _drop_vanishing_k_bias(gradients, references)
    assert_all_close(gradients, references, GRADIENT_BOUND)
    assert layout.used_tokens < layout.num_tokens  # there was padding


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_presets_have_the_published_number_of_parameters_and_eps(preset, groups):
    config = CogVideoXConfig(preset=preset)
    core = transformer_core(config, ParallelConfig(), groups, torch.bfloat16)
    with torch.device("meta"):
        ours = CogVideoXTransformer(config, core, groups)
        settings = _diffusers_settings(config)
        del settings["norm_eps"]  # theirs by default
        theirs = CogVideoXTransformer3DModel(**settings)
    counted = sum(parameter.numel() for parameter in ours.parameters())
    published = {
        "cogvideox_2b": 1_693_783_872,
        "cogvideox_5b": 5_570_283_072,
        "cogvideox_5b_i2v": 5_570_479_680,
        "cogvideox1_5_5b": 5_570_676_352,
        "cogvideox1_5_5b_i2v": 5_571_594_880,
    }
    assert counted == published[preset] == sum(parameter.numel() for parameter in theirs.parameters())
    default = {name: entry.default for name, entry in inspect.signature(CogVideoXTransformer3DModel).parameters.items()}
    same = ("patch_size", "max_text_seq_length", "spatial_interpolation_scale", "temporal_interpolation_scale",
            "temporal_compression_ratio", "attention_head_dim", "out_channels", "time_embed_dim")  # fmt: skip
    assert {name: getattr(config, name) for name in same} == {name: default[name] for name in same}
    native = config.sample_frames, config.sample_height, config.sample_width
    first = default["sample_frames"], default["sample_height"], default["sample_width"]
    assert (native, config.patch_size_t) == (((81, 300, 300), 2) if "1_5" in preset else (first, 1))
    mine, reference = ours.blocks["0"], theirs.transformer_blocks[0]
    assert mine.attention_norm.eps == mine.mlp_norm.eps == reference.norm1.norm.eps
    assert mine.attention.q_norm.eps == config.qk_norm_eps == reference.attn1.norm_q.eps
    assert ours.head.norm_final.eps == ours.head.norm_out.eps == theirs.norm_out.norm.eps
    table = sum(buffer.numel() for buffer in ours.buffers())
    assert table == (54_607_872 if preset == "cogvideox_5b_i2v" else 0)


def _diffusers_settings(config):
    return {
        **{
            name: getattr(config, name)
            for name in (
                "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "time_embed_dim",
                "ofs_embed_dim", "text_embed_dim", "num_layers", "sample_width", "sample_height", "sample_frames",
                "patch_size", "max_text_seq_length", "spatial_interpolation_scale", "temporal_interpolation_scale",
                "norm_eps", "use_rotary_positional_embeddings", "use_learned_positional_embeddings",
            )
        },
        "patch_size_t": None if config.patch_size_t == 1 else config.patch_size_t,
    }  # fmt: skip


def _diffusers_model(config):
    model = CogVideoXTransformer3DModel(**_diffusers_settings(config)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and "linear" not in name and name.endswith("weight")
            scale = 0.3 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            if ".to_q." in name or ".to_k." in name:
                scale *= 0.03  # so small that the eps of the norms over q and k is seen
            parameter.copy_(draws.normal(tuple(parameter.shape), 1, name) * scale + float(is_norm))
        if config.use_learned_positional_embeddings:
            table = model.patch_embed.pos_embedding
            model.patch_embed.pos_embedding = draws.normal(tuple(table.shape), 1, "positions")
            # For other lengths diffusers falls back to sine and cosine; the released training code takes the front of
            # the table, and so do we.
            model.patch_embed._get_positional_embeddings = lambda height, width, frames, device: (
                model.patch_embed.pos_embedding[:, : TEXT + ((frames - 1) // 4 + 1) * (height // 2) * (width // 2)]
            )
    return model.train()


def _our_model(config, groups):
    return CogVideoXTransformer(config, transformer_core(config, ParallelConfig(), groups, torch.float32), groups)


def _inputs(config, place, frames, height, width, text_length):
    latents = draws.normal((frames, config.in_channels, height, width), 2, "latents", place)
    text = draws.normal((text_length, config.text_embed_dim), 2, "text", place)
    return latents, text, 999 - 333 * place


def _run_diffusers(model, config, latents, text, timestep):
    """Return rows `[V, P]` of one sample on its own, its first frame repeated where the temporal patch asks for it."""
    repeats = -len(latents) % config.patch_size_t
    latents = torch.cat([latents[:1].expand(repeats, -1, -1, -1), latents])
    frames, _, height, width = latents.shape
    rotary = None
    if config.use_rotary_positional_embeddings:
        grid = height // 2, width // 2
        native = config.sample_height // 2, config.sample_width // 2
        crops = get_resize_crop_region_for_grid(grid, native[1], native[0])
        kind = {"slice": ("slice", (32, 32)), "crop": ("linspace", None)}[config.rope_grid]
        rotary = get_3d_rotary_pos_embed(
            config.attention_head_dim, crops, grid, frames // config.patch_size_t, grid_type=kind[0], max_size=kind[1]
        )
    ofs = None if config.ofs_embed_dim is None else torch.full((1,), 2.0)
    output = model(latents[None], text[None], torch.tensor([timestep]), ofs=ofs, image_rotary_emb=rotary).sample[0]
    return patchify(output, config.patch)


def _run_pack(model, config, samples):
    """Return the rows of each sample, out of one forward of them all."""
    places = [
        place_sample(place, latents.shape[0], *latents.shape[2:], len(text), config.patch)
        for place, (latents, text, _) in enumerate(samples)
    ]
    layout = place_on_rope_grid(build_layout(places, config.patch, multiple=64), config)
    video = torch.cat([patchify(latents, config.patch) for latents, _, _ in samples])
    padding = torch.zeros(layout.samples[-1].length, config.text_embed_dim)
    text = torch.cat([*(text for _, text, _ in samples), padding])
    timesteps = torch.tensor([*(timestep for _, _, timestep in samples), 0])
    rows = model(video, text, timesteps, layout)
    return rows.split([place.video_length for place in places]), layout


def _drop_vanishing_k_bias(gradients, references):
    """Without rotation a bias common to all keys cancels in the softmax: its true gradient is 0, rounding is left."""
    largest = max(float(tensor.norm()) for tensor in references.values())
    for name in [name for name in references if name.endswith("k_norm.bias")]:
        assert float(gradients.pop(name).norm()) < 1e-5 * largest
        assert float(references.pop(name).norm()) < 1e-5 * largest
