import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, transformer_core
from megacogvx.models.transformer.flops import cost_coefficients, forward_flops, sample_flops, training_flops
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown

TINY = CogVideoXConfig(preset="tiny", num_layers=2)
OFFSET = CogVideoXConfig(preset="tiny", num_layers=1, patch_size_t=2, in_channels=8, ofs_embed_dim=128)


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def _layout(config, multiple):
    sizes = ((2, 8, 8, 16), (1, 4, 6, 3), (4, 8, 4, 7))
    return build_layout(
        [place_sample(i, *size, config.patch) for i, size in enumerate(sizes)], config.patch, multiple=multiple
    )


def _counted(config, layout, groups, backward=False, dtype=torch.float32):
    """Return what torch counts of one forward pass, and of backward, on tensors without memory."""
    local = layout.local(device="meta")
    core = transformer_core(config, ParallelConfig(), groups, dtype)
    with torch.device("meta"):
        model = CogVideoXTransformer(config, core, groups)
        shapes = ((len(local.video_index), config.row_size_in), (len(local.text_index), config.text_embed_dim))
        video, text = (torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes)
        timesteps = torch.empty(layout.num_samples, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        rows = model(video, text, timesteps, layout)
        if backward:
            rows.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("multiple", [1, 64])
def test_forward_equals_what_torch_counts(multiple, groups):
    layout = _layout(TINY, multiple)
    assert forward_flops(TINY, layout, padding=True) == _counted(TINY, layout, groups)


def test_padding_costs_and_is_no_model_flops():
    short, padded = _layout(TINY, 1), _layout(TINY, 64)
    assert forward_flops(TINY, padded) == forward_flops(TINY, short)
    assert forward_flops(TINY, padded, padding=True) > forward_flops(TINY, short, padding=True)
    assert forward_flops(TINY, short, padding=True) - forward_flops(TINY, short) == sample_flops(TINY)


def test_other_patches_and_the_offset_are_counted(groups):
    layout = _layout(OFFSET, 32)
    assert forward_flops(OFFSET, layout, padding=True) == _counted(OFFSET, layout, groups)


def test_training_is_three_times_the_forward(groups):
    layout = _layout(TINY, 64)
    # The condition's first layer has no gradient to hand on: its input is the timestep's code.
    spared = 2 * TINY.hidden_size * TINY.time_embed_dim * layout.num_samples
    assert training_flops(TINY, layout, padding=True) - spared == _counted(TINY, layout, groups, backward=True)


def test_cost_coefficients_predict_a_sample_from_its_length():
    config = CogVideoXConfig(preset="cogvideox_5b")
    a, b = cost_coefficients(config)
    for frames, height, width in ((13, 32, 48), (13, 60, 90), (41, 96, 170)):
        layout = build_layout([place_sample(0, frames, height, width, 226, config.patch)], config.patch)
        tokens = layout.num_tokens
        assert a * tokens + b * tokens**2 == pytest.approx(training_flops(config, layout), rel=0.01)


def test_one_sample_of_the_published_size():
    config = CogVideoXConfig(preset="cogvideox_5b")
    layout = build_layout([place_sample(0, 13, 60, 90, 226, config.patch)], config.patch)
    assert layout.num_tokens == 17776
    assert training_flops(config, layout) == pytest.approx(1.0e15, rel=0.02)


@pytest.mark.parametrize(
    "sizes",
    [
        ((13, 32, 48),) * 5,
        ((13, 60, 90),) * 4,
        ((21, 96, 170),),
        ((13, 32, 48), (1, 32, 48), (25, 32, 56), (1, 32, 32), (7, 60, 90)),
    ],
    ids=["5 x 5,218", "4 x 17,776", "1 x 85,906", "mixed"],
)
def test_a_layer_of_the_5b_model_equals_what_torch_counts(sizes, groups):
    config = CogVideoXConfig(preset="cogvideox_5b", num_layers=1, sample_height=96, sample_width=170)
    layout = build_layout([place_sample(i, *size, 226, config.patch) for i, size in enumerate(sizes)], config.patch)
    counted = _counted(config, layout, groups, backward=True, dtype=torch.bfloat16)
    assert training_flops(config, layout) == pytest.approx(counted, rel=1e-3)
