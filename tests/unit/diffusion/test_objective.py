from dataclasses import replace

import pytest
import torch

from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.objective import loss_count, sample_weights, v_loss
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.pack_layout import PackLayout, build_layout, place_sample
from megacogvx.patches import patchify

TIMESTEPS = torch.tensor([30, 999, 540, 0])


def pack(patch=(1, 2, 2), multiple=1):
    sizes = [(3, 4, 6), (1, 8, 8), (5, 2, 4)]
    samples = [place_sample(i, *size, 5, patch) for i, size in enumerate(sizes)]
    return build_layout(samples, patch, multiple=multiple), [torch.randn(t, 4, h, w) for t, h, w in sizes]


def rows(latents, patch):
    return torch.cat([patchify(x, patch) for x in latents])


def test_mean_over_samples_equals_mean_of_sample_means():
    layout, target = pack()
    prediction = [torch.randn_like(x) for x in target]
    sums = v_loss(rows(prediction, layout.patch), rows(target, layout.patch), TIMESTEPS, layout, layout.local())
    expected = sum(((a - b) ** 2).mean() for a, b in zip(prediction, target, strict=True))
    torch.testing.assert_close(sums.total, expected)
    assert loss_count(layout, range(layout.num_tokens), "sample") == 3 and sample_weights(layout, "sample") == [1, 1, 1]


def test_mean_over_tokens_equals_mean_over_elements():
    layout, target = pack()
    prediction = [torch.randn_like(x) for x in target]
    a, b = rows(prediction, layout.patch), rows(target, layout.patch)
    sums = v_loss(a, b, TIMESTEPS, layout, layout.local(), loss_mean="token")
    count = loss_count(layout, range(layout.num_tokens), "token")
    assert count == len(a) == sum(sample_weights(layout, "token"))
    torch.testing.assert_close(sums.total / count, ((a - b) ** 2).mean())


@pytest.mark.parametrize("q", [2, 4])
def test_repeated_frames_carry_no_loss(q):
    layout, target = pack(patch=(q, 2, 2))
    a, b = (rows(x, layout.patch) for x in ([torch.randn_like(x) for x in target], target))
    first = layout.local()
    before = v_loss(a, b, TIMESTEPS, layout, first).total
    assert {-frames % q for frames in (3, 1, 5)} <= set(first.repeated.tolist())
    for frame in range(q):
        copies = first.repeated > frame  # rows whose frame of this number is a copy of the first latent frame
        poisoned = a.clone().reshape(len(a), 4, q, 2, 2)
        poisoned[copies, :, frame] += 100.0
        torch.testing.assert_close(v_loss(poisoned.reshape(a.shape), b, TIMESTEPS, layout, first).total, before)
        poisoned[~copies, :, frame] += 100.0  # a real frame
        assert v_loss(poisoned.reshape(a.shape), b, TIMESTEPS, layout, first).total > before + 1000


@pytest.mark.parametrize("loss_mean", ["sample", "token"])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_sums_and_counts_of_ranks_add_up(loss_mean, patch):
    layout, target = pack(patch, multiple=4)
    a, b = (rows(x, patch) for x in ([torch.randn_like(x) for x in target], target))
    whole = v_loss(a, b, TIMESTEPS, layout, layout.local(), loss_mean=loss_mean)
    parts, counts, done = [], 0, 0
    for context in range(2):
        for tensor in range(2):
            local = layout.local((tensor, 2), (context, 2))
            end = done + len(local.video_index)
            parts.append(v_loss(a[done:end], b[done:end], TIMESTEPS, layout, local, loss_mean=loss_mean))
            done = end
        counts += loss_count(layout, local.context_tokens, loss_mean)
    assert counts == loss_count(layout, range(layout.num_tokens), loss_mean)
    for name in ("total", "by_interval", "weight_by_interval"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_a_rank_that_holds_text_alone_adds_nothing(patch):
    layout, target = pack(patch, multiple=16)
    local = layout.local((0, 4), (0, 4))
    assert len(local.tokens) and not len(local.video_index)
    empty = rows(target, patch)[:0].requires_grad_()
    sums = v_loss(empty, empty.detach(), TIMESTEPS, layout, local)
    sums.total.backward()
    assert float(sums.total.detach()) == 0.0 and not sums.weight_by_interval.any() and empty.grad.shape == empty.shape


def test_a_sample_is_counted_where_its_video_begins():
    layout, _ = pack()
    second = layout.boundaries[1]  # a cut within the second sample's text: tokens second .. second + 4
    assert loss_count(layout, range(second + 2), "sample") == 1
    assert loss_count(layout, range(second + 2, layout.num_tokens), "sample") == 2


def test_intervals_hold_the_samples_timesteps():
    layout, target = pack()
    a, b = (rows(x, layout.patch) for x in ([torch.randn_like(x) for x in target], target))
    sums = v_loss(a, b, TIMESTEPS, layout, layout.local())
    torch.testing.assert_close(sums.weight_by_interval, torch.tensor([1.0, 0, 0, 0, 0, 1, 0, 0, 0, 1]))
    torch.testing.assert_close(sums.by_interval.sum(), sums.total)
    torch.testing.assert_close(sums.by_interval[9], ((a[18:34] - b[18:34]) ** 2).mean())


def test_gradient_reaches_the_prediction_only_through_the_total():
    layout, target = pack()
    a = rows([torch.randn_like(x) for x in target], layout.patch).bfloat16().requires_grad_()
    sums = v_loss(a, rows(target, layout.patch), TIMESTEPS, layout, layout.local())
    assert sums.total.dtype == torch.float32 and not sums.by_interval.requires_grad
    sums.total.backward()
    assert a.grad is not None and a.grad.abs().sum() > 0


def test_equals_the_weighted_error_of_x0():
    """(x0_predicted - x0)^2 / (1 - abar), the form in which the objective was published."""
    schedule, layout_target = NoiseSchedule(DiffusionConfig()), pack()
    layout, target = layout_target
    x0 = rows(target, layout.patch)
    noise, prediction = torch.randn_like(x0), torch.randn_like(x0)
    t = TIMESTEPS[layout.local().modulation_rows[layout.local().video_index] // 2]
    xt, v = schedule.add_noise(x0, noise, t), schedule.velocity(x0, noise, t)
    weight = 1.0 / (1.0 - schedule.alphas_cumprod[t].float())[:, None]
    expected = (weight * (schedule.to_x0(xt, prediction, t) - x0) ** 2).sum() / x0.shape[1]
    torch.testing.assert_close(
        v_loss(prediction, v, TIMESTEPS, layout, layout.local(), loss_mean="token").total, expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("loss_mean", ["sample", "token"])
def test_a_sample_that_could_not_be_read_weighs_nothing(loss_mean):
    """The loss and its divisor are those of a pack of the other samples alone, whatever its rows hold."""
    layout, target = pack()
    bad = PackLayout(tuple(replace(s, carries_loss=m != 1) for m, s in enumerate(layout.samples)), layout.patch)
    prediction = [torch.randn_like(x) for x in target]
    a, b = rows(prediction, layout.patch), rows(target, layout.patch)
    sums = v_loss(a, b, TIMESTEPS, bad, bad.local(), loss_mean=loss_mean)
    count = loss_count(bad, range(bad.num_tokens), loss_mean)
    errors = [(p - t) ** 2 for p, t in zip(prediction[::2], target[::2], strict=True)]
    means = [error.mean() for error in errors] if loss_mean == "sample" else [torch.cat([e.flatten() for e in errors])]
    torch.testing.assert_close(sums.total / count, torch.stack(means).mean())
    assert sample_weights(bad, loss_mean)[1] == 0
