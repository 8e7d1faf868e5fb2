import re

import pytest
import torch
import torch.nn.functional as F

from megacogvx import draws
from megacogvx.config import Section, build_config
from megacogvx.errors import ConfigError
from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, initialize_weights, transformer_core
from megacogvx.models.transformer.ablations import each_modality, sequences_of
from megacogvx.models.transformer.flops import forward_flops
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.tolerance import assert_all_close, assert_close

SMALL = {"preset": "tiny", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}
ABLATIONS: dict[str, dict] = {
    "published": {},
    "shared_adaln": {"block": "shared_adaln"},
    "mmdit": {"block": "mmdit"},
    "2d_1d": {"attention": "2d_1d"},
    "sinusoidal": {"use_rotary_positional_embeddings": False},
    "mmdit 2d_1d": {"block": "mmdit", "attention": "2d_1d"},
}
SIZES = ((2, 8, 8, 5), (1, 4, 6, 3), (3, 6, 4, 1))
TIMESTEPS = (999, 500, 0)


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def _model(groups, name, recompute="none"):
    config = CogVideoXConfig(**{**SMALL, **ABLATIONS[name]})
    model = CogVideoXTransformer(
        config, transformer_core(config, ParallelConfig(recompute=recompute), groups, torch.float32), groups
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(draws.normal(tuple(parameter.shape), 0, name) * scale + float(is_norm))
    return model


def _run(model, places, multiple=1, change=None):
    """Return the rows of each sample of a pack of `places`; `change(place, video, text)` may edit its inputs."""
    config, samples, videos, texts = model.config, [], [], []
    for place in places:
        sample = place_sample(place, *SIZES[place], config.patch)
        video = draws.normal((sample.video_length, config.row_size_in), 1, "video", place)
        text = draws.normal((sample.text_length, config.text_embed_dim), 1, "text", place)
        video, text = change(place, video, text) if change else (video, text)
        samples, videos, texts = [*samples, sample], [*videos, video], [*texts, text]
    layout = build_layout(samples, config.patch, multiple=multiple)
    texts.append(torch.zeros(layout.samples[-1].length, config.text_embed_dim))
    timesteps = torch.tensor([*(TIMESTEPS[place] for place in places), 0])
    rows = model(torch.cat(videos), torch.cat(texts), timesteps, layout)
    return rows.split([sample.video_length for sample in samples])


def _gradients(model, packs):
    model.zero_grad()
    for places in packs:
        found = _run(model, places)
        cotangents = [
            draws.normal(tuple(rows.shape), 2, "cotangent", place) for place, rows in zip(places, found, strict=True)
        ]
        torch.autograd.backward(found, cotangents)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_pack_equals_its_samples_with_gradients(name, groups):
    model = _model(groups, name)
    for place, rows in enumerate(_run(model, (0, 1, 2), multiple=64)):
        (alone,) = _run(model, (place,))
        assert_close(rows, alone, 1e-5, f"sample {place}")
    packed, singles = _gradients(model, [(0, 1, 2)]), _gradients(model, [(0,), (1,), (2,)])
    if name == "sinusoidal":  # without rotation a bias common to all keys cancels in the softmax; rounding is left
        packed, singles = ({n: g for n, g in part.items() if "k_norm.bias" not in n} for part in (packed, singles))
    assert_all_close(packed, singles, 1e-4)
    unread = ("blocks.1.text_out", "blocks.1.text_mlp")  # the head doesn't read the text
    if name != "mmdit 2d_1d":  # whose second layer doesn't read the text either
        assert all(bool(gradient.any()) != n.startswith(unread) for n, gradient in packed.items())


@pytest.mark.parametrize("name", ["mmdit", "2d_1d"])
def test_one_sample_leaves_the_others_bit_identical(name, groups):
    model = _model(groups, name)
    before = _run(model, (0, 1, 2))
    after = _run(model, (0, 1, 2), change=lambda p, v, t: (v + 1, t - 1) if p == 1 else (v, t))
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1], atol=1e-2)


@pytest.mark.parametrize("recompute", ["keep_attention", "full", "block:1"])
def test_recompute_of_mmdit_changes_no_bit(recompute, groups):
    plain, again = (_gradients(_model(groups, "mmdit", policy), [(0, 1, 2)]) for policy in ("none", recompute))
    assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())


def test_shared_modulation_is_the_same_for_both_modalities(groups):
    block = _model(groups, "shared_adaln").blocks["0"]
    condition = draws.normal((3, block.attention_modulation.linear.weight.shape[1]), 0, "condition")
    table = block.attention_modulation(condition)
    linear = block.attention_modulation.linear
    expected = F.linear(F.silu(condition), linear.weight, linear.bias).reshape(3, 3, -1)
    assert table.shape == (6, 3, expected.shape[-1])
    for modality in (0, 1):
        assert_close(table[modality::2], expected, 1e-6, f"modality {modality}")


def test_mmdit_with_equal_weights_is_the_published_block(groups):
    model = _model(groups, "mmdit")
    published = CogVideoXTransformer(
        CogVideoXConfig(**SMALL), transformer_core(CogVideoXConfig(**SMALL), ParallelConfig(), groups, torch.float32),
        groups,
    )  # fmt: skip
    published.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not re.search(r"blocks.*\.text_", name)}
    )
    assert not torch.allclose(_run(model, (0,))[0], _run(published, (0,))[0], atol=1e-2)
    for block in model.blocks.values():
        block.text_qkv.load_state_dict(block.attention.qkv.state_dict())
        block.text_out.load_state_dict(block.attention.out.state_dict())
        block.text_mlp.load_state_dict(block.mlp.state_dict())
    for rows, expected in zip(_run(model, (0, 1, 2)), _run(published, (0, 1, 2)), strict=True):
        assert_close(rows, expected, 1e-5)


def test_each_modality_puts_tokens_back_in_their_places():
    layout = build_layout([place_sample(i, *size, (1, 2, 2)) for i, size in enumerate(SIZES)], (1, 2, 2))
    local = layout.local()
    tokens = torch.arange(layout.num_tokens, dtype=torch.float32)[:, None, None]
    out = each_modality(lambda x: x + 1000, lambda x: -x, tokens, local)
    is_text = local.modulation_rows % 2 == 1
    assert torch.equal(out[:, 0, 0], torch.where(is_text, -tokens[:, 0, 0], tokens[:, 0, 0] + 1000))


def test_the_published_blocks_linears_are_those_of_the_video(groups):
    """So that published weights, or their initial values, go to the modality that they have most to do with."""
    model, tokens = _model(groups, "mmdit"), {}
    block = model.blocks["0"]
    linears = {"video": (block.attention.qkv, block.attention.out, block.mlp.fc1),
               "text": (block.text_qkv, block.text_out, block.text_mlp.fc1)}  # fmt: skip
    for modality, modules in linears.items():
        for module in modules:
            module.register_forward_pre_hook(lambda _, x, m=modality: tokens.setdefault(m, []).append(len(x[0])))
    _run(model, (0, 1, 2))
    assert tokens == {"video": [32 + 6 + 18] * 3, "text": [5 + 3 + 1] * 3}


def test_text_within_frames_takes_the_mean_of_what_each_frame_gave_it(groups):
    attention = _model(groups, "2d_1d").blocks["0"].attention
    layout = build_layout([place_sample(0, 3, 8, 8, 5, (1, 2, 2))], (1, 2, 2))
    q, k = (draws.normal((layout.num_tokens, 2, 16), 3, name) for name in "qk")
    assert_close(attention.attend(q, k, torch.ones_like(q), layout), torch.ones_like(q), 1e-6)


def test_sequences_within_frames_and_along_time():
    layout = build_layout([place_sample(0, 2, 4, 2, 2, (1, 2, 2)), place_sample(1, 1, 2, 2, 1, (1, 2, 2))], (1, 2, 2))
    tokens, boundaries = sequences_of(layout, along_time=False)
    assert tokens.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert boundaries == (0, 4, 8, 10)
    tokens, boundaries = sequences_of(layout, along_time=True)
    assert tokens.tolist() == [0, 1, 2, 4, 3, 5, 6, 7]
    assert boundaries == (0, 2, 4, 6, 7, 8)


def test_a_layer_within_frames_sees_no_other_frame_and_one_along_time_no_other_place(groups):
    model = _model(groups, "2d_1d")
    layout = build_layout([place_sample(0, 3, 8, 8, 5, (1, 2, 2))], (1, 2, 2))
    heads = [draws.normal((layout.num_tokens, 2, 16), 3, name) for name in "qkv"]
    changed = [head.clone() for head in heads]
    for head in changed:
        head[5 + 16] += 1.0  # the first place of the second frame
    for layer, touched in (("0", {*range(5), *range(21, 37)}), ("1", {5, 21, 37})):
        attention = model.blocks[layer].attention
        difference = attention.attend(*changed, layout) - attention.attend(*heads, layout)
        assert set(torch.nonzero(difference.flatten(1).any(1)).flatten().tolist()) == touched


def test_flops_of_shared_modulation_and_2d_1d_are_less():
    layout = build_layout([place_sample(0, 5, 16, 16, 8, (1, 2, 2))], (1, 2, 2))
    full = CogVideoXConfig(**{**SMALL, "num_layers": 2})
    width, heads = full.hidden_size, forward_flops(full, layout)
    factorised = forward_flops(full.model_copy(update={"attention": "2d_1d"}), layout)
    pairs = 5 * (8 + 64) ** 2 + 8**2 + 64 * 5**2
    assert heads - factorised == 4 * width * (2 * (8 + 5 * 64) ** 2 - pairs)
    shared = forward_flops(full.model_copy(update={"block": "shared_adaln"}), layout)
    assert heads - shared == 2 * 2 * full.time_embed_dim * 6 * width


class _Root(Section):
    model: CogVideoXConfig = CogVideoXConfig()


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        ({"block": "mmdit"}, (2, 1, "none"), "model.block=mmdit with parallel.tensor_parallel_size=2"),
        ({"block": "mmdit"}, (1, 1, "selective"), "model.block=mmdit with parallel.recompute=selective"),
        ({"attention": "2d_1d"}, (1, 2, "none"), "model.attention=2d_1d with parallel.ring_size=2"),
    ],
)
def test_layouts_that_an_ablation_cannot_run_on(model, layout, message):
    config = build_config(_Root, {"model": model}).model
    assert config.layout_problem(*layout).startswith(message)
    assert config.layout_problem(1, 1, "full") is None
    assert CogVideoXConfig().layout_problem(*layout) is None


def test_a_refused_recompute_is_a_config_error(groups):
    with pytest.raises(ConfigError, match=r"selective.*what works is none"):
        _model(groups, "mmdit", "selective")


def test_initial_weights_of_every_ablation_are_drawn(groups):
    model = _model(groups, "mmdit")
    initialize_weights(model, seed=0)
    block = model.blocks["0"]
    assert block.text_qkv.weight.abs().max() > block.attention.qkv.weight.abs().max() * 0.9
    assert not torch.equal(block.text_qkv.weight, block.attention.qkv.weight)
    assert not block.attention_modulation.linear.weight.any()
