"""What a rank computes with is a cut of the same noised pack, whatever the layout."""

from dataclasses import dataclass, replace

import pytest
import torch

from megacogvx.data.pack import Pack, needed_frames
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.training.batch import BatchMaker
from megacogvx.training.text_condition import TextRows

CHANNELS, TEXT_WIDTH = 4, 6
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (3, 2)]  # tensor, context


@dataclass
class Ranks:
    """Stands for ParallelGroups: a batch asks for places and a device alone."""

    tensor: tuple[int, int]
    context: tuple[int, int]
    device: str = "cpu"


def pack(q: int) -> Pack:
    patch = (q, 2, 2)
    shapes = [(11, 3, 4, 6, 5), (22, 1, 6, 4, 3), (33, 5, 4, 4, 7)]  # id, T, H, W, text
    layout = build_layout([place_sample(*shape, patch) for shape in shapes], patch, multiple=24)
    draw = torch.Generator().manual_seed(0)
    latents = [torch.randn(t, h, w, 2 * CHANNELS, generator=draw).bfloat16() for _, t, h, w, _ in shapes]
    text = [torch.randn(length, TEXT_WIDTH, generator=draw).bfloat16() for *_, length in shapes]
    return Pack(layout, latents, text, step=9, place=0)


def maker(tensor=(0, 1), context=(0, 1), **diffusion) -> BatchMaker:
    config = DiffusionConfig(**diffusion)
    return BatchMaker(config, NoiseSchedule(config), 0.7, 5, Ranks(tensor, context), torch.float32)


def batches(q, tensor, context, **diffusion):
    ranks = [((t, tensor), (c, context)) for c in range(context) for t in range(tensor)]
    return [maker(*rank, **diffusion).prepare(pack(q), [100, 500, 999]) for rank in ranks]


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize(("tensor", "context"), LAYOUTS)
@pytest.mark.parametrize("name", ["video_SP", "text_SE", "target_SP"])
def test_rows_of_all_ranks_are_the_rows_of_one(q, tensor, context, name):
    (whole,) = batches(q, 1, 1)
    parts = batches(q, tensor, context)
    assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize(("loss_mean", "total"), [("sample", 3), ("token", 3 * 6 + 1 * 6 + 5 * 4)])
@pytest.mark.parametrize(("tensor", "context"), LAYOUTS)
def test_counts_of_the_context_ranks_add_up_and_tensor_ranks_agree(tensor, context, loss_mean, total):
    counts = [batch.count for batch in batches(1, tensor, context, loss_mean=loss_mean)]
    assert sum(counts[::tensor]) == total
    assert counts == [counts[place // tensor * tensor] for place in range(len(counts))]


def test_noisy_rows_and_target_are_the_scaled_latents_and_noise():
    (batch,) = batches(1, 1, 1)
    config = DiffusionConfig()
    a = NoiseSchedule(config).alphas_cumprod[100].sqrt().item()
    s = (1 - a**2) ** 0.5
    rows = slice(0, 18)  # of the first sample
    latents = a * batch.video_SP[rows] - s * batch.target_SP[rows]
    moments = pack(1).latents[0].float()
    mean, deviation = moments[..., :CHANNELS], (0.5 * moments[..., CHANNELS:]).exp()
    assert abs(latents.mean() - 0.7 * mean.mean()) < 0.7 * 4 * deviation.mean() / 18
    assert (latents.std() / (0.7 * (mean.var() + deviation.square().mean()).sqrt()) - 1).abs() < 0.3


def test_repeated_first_frame_has_the_same_latents_but_its_own_noise():
    (batch,) = batches(2, 1, 1)
    a = NoiseSchedule(DiffusionConfig()).alphas_cumprod[100].sqrt().item()
    latents = a * batch.video_SP - (1 - a**2) ** 0.5 * batch.target_SP
    first, second = latents[:6].reshape(6, CHANNELS, 2, 4).unbind(2)  # the first sample: frames 0, 0, 1, 2
    assert torch.allclose(first, second, atol=1e-5)
    noisy_first, noisy_second = batch.video_SP[:6].reshape(6, CHANNELS, 2, 4).unbind(2)
    assert not torch.allclose(noisy_first, noisy_second, atol=1e-2)


def test_conditioning_is_dropped_at_its_rate_and_padding_is_zeros():
    dropping = maker(conditioning_dropout=0.25)
    rate = sum(dropping.drops_conditioning(step, 7) for step in range(2000)) / 2000
    assert abs(rate - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    all_dropped = maker(conditioning_dropout=1.0).prepare(pack(1), [1, 2, 3])
    none_dropped = maker(conditioning_dropout=0.0).prepare(pack(1), [1, 2, 3])
    assert not all_dropped.text_SE.any()
    real = 5 + 3 + 7
    assert none_dropped.text_SE[:real].any(dim=1).all() and not none_dropped.text_SE[real:].any()


def test_other_steps_and_samples_get_other_noise():
    first = maker().prepare(pack(1), [999, 999, 999]).video_SP
    later = pack(1)
    other = maker().prepare(Pack(later.layout, later.latents, later.text, step=10, place=0), [999, 999, 999]).video_SP
    assert not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("rank", range(4))
def test_a_pack_cut_for_a_rank_gives_the_same_batch(q, rank):
    """The loader reads only the frames that a rank's tokens need; its batch is that of the whole pack."""
    whole = pack(q)
    cut = ((rank % 2, 2), (rank // 2, 2))
    needed = needed_frames(whole.layout, cut)
    latents = [t[frames.start : frames.stop] for t, frames in zip(whole.latents, needed, strict=True)]
    part = replace(whole, latents=latents, first_frames=tuple(frames.start for frames in needed))
    assert sum(map(len, latents)) < sum(map(len, whole.latents))
    expected, found = (maker(*cut).prepare(p, [5, 500, 999]) for p in (whole, part))
    assert torch.equal(found.video_SP, expected.video_SP) and torch.equal(found.target_SP, expected.target_SP)
    assert torch.equal(found.text_SE, expected.text_SE)


@pytest.mark.parametrize("context", [1, 2])
def test_a_dropped_text_may_be_the_empty_prompt(context):
    """Its rows are cut over ranks as those of any text are."""
    layout = build_layout([place_sample(number, 1, 4, 4, 4, (1, 2, 2)) for number in (1, 2)], (1, 2, 2), multiple=6)
    draw = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 4, 4, 2 * CHANNELS, generator=draw).bfloat16() for _ in range(2)]
    text = [torch.randn(4, TEXT_WIDTH, generator=draw).bfloat16() for _ in range(2)]
    empty_LE = torch.arange(4 * TEXT_WIDTH).reshape(4, TEXT_WIDTH).bfloat16()
    whole = Pack(layout, latents, text, step=9, place=0)
    rows = []
    for rank in range(context):
        dropping = replace(
            maker(context=(rank, context), conditioning_dropout=1.0), texts=TextRows(TEXT_WIDTH, empty_LE=empty_LE)
        )
        rows.append(dropping.prepare(whole, [5, 6]).text_SE)
    assert torch.equal(torch.cat(rows)[:8], torch.cat([empty_LE, empty_LE]).float())
    assert not torch.cat(rows)[8:].any()
