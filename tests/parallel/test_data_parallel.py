"""Gradient reduction, optimizer and schedule on several ranks equal torch's AdamW on one process."""

from __future__ import annotations

import math

import torch

from megacogvx.testing.mini_model import MiniModel, fill, forward_step, loss_of, packs
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close

TP2 = {"tensor_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
STEPS, PACKS = 3, 4
SETTINGS = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1, "total_steps": 10, "weight_decay": 0.1, "clip_grad": 0.5}
BETAS, EPS = (0.9, 0.95), 1e-8


def reference_rate(step):
    """Warmup to the end of step 0, then half a cosine to the end of the last step."""
    done = max(0, step - SETTINGS["warmup_steps"]) / (SETTINGS["total_steps"] - SETTINGS["warmup_steps"])
    return SETTINGS["min_lr"] + (SETTINGS["lr"] - SETTINGS["min_lr"]) * 0.5 * (1 + math.cos(math.pi * done))


def train_plainly(steps=STEPS):
    """Train the plain model with torch alone; return it, the norms and the mean losses of the steps."""
    model = fill(MiniModel(None))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": SETTINGS["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    norms, losses = [], []
    for step in range(steps):
        optimizer.zero_grad()
        total = sum(loss_of(pack, model(pack), None) for pack in packs(step, PACKS))
        mean = total / sum(pack.loss_rows for pack in packs(step, PACKS))
        mean.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["clip_grad"])))
        losses.append(float(mean.detach()))
        for group in optimizer.param_groups:
            group["lr"] = reference_rate(step)
        optimizer.step()
    return model, norms, losses


def make(groups, dtype=torch.float32, **changes):
    from megacogvx.parallel.data_parallel import wrap
    from megacogvx.parallel.optimizer import build_optimizer

    model = fill(MiniModel(groups, dtype))
    wrapped = wrap(model, model.core, groups, overlap=changes.pop("overlap", False))
    return wrapped, build_optimizer(wrapped, groups, betas=BETAS, eps=EPS, **{**SETTINGS, **changes})


def take_step(wrapped, optimizer, step, groups, pick=lambda packs: packs):
    from megacogvx.parallel.data_parallel import forward_backward, sum_over_data_and_context, sum_over_tokens

    mine = packs(step, PACKS, device=groups.device)[groups.data[0] :: groups.data[1]]
    optimizer.zero_grad()
    optimizer.schedule(step)
    metrics = forward_backward(forward_step, pick(mine), wrapped, groups, num_microbatches=len(mine))
    loss = sum_over_tokens(torch.stack([m["loss"] for m in metrics]).sum(), groups)
    count = sum_over_data_and_context(torch.stack([m["count"] for m in metrics]).sum(), groups)
    return *optimizer.step(), float(loss / count)


def assert_weights(model, reference, groups, bound):
    from megacogvx.parallel.tensor_parallel import shard_of

    for (name, mine), full in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert_close(mine.cpu(), shard_of(full.detach(), mine, groups), bound, name)


@on_ranks(2, {}, TP2, CP2)
def test_three_steps_equal_torch_on_one_process(groups):
    reference, norms, losses = train_plainly()
    for overlap in (False, True):
        wrapped, optimizer = make(groups, overlap=overlap)
        for step in range(STEPS):
            taken, norm, loss = take_step(wrapped, optimizer, step, groups)
            assert taken
            assert abs(norm / norms[step] - 1) < 1e-5, (step, norm, norms)
            assert abs(loss / losses[step] - 1) < 1e-5, (step, loss, losses)
        assert norms[0] > SETTINGS["clip_grad"]
        assert_weights(wrapped.module, reference, groups, 1e-5)


@on_ranks(4, {**TP2, **CP2}, TP2, CP2)
def test_three_steps_on_four_ranks(groups):
    reference, norms, _ = train_plainly()
    wrapped, optimizer = make(groups)
    for step in range(STEPS):
        _, norm, _ = take_step(wrapped, optimizer, step, groups)
        assert abs(norm / norms[step] - 1) < 1e-5, (step, norm, norms)
    assert_weights(wrapped.module, reference, groups, 1e-5)


@on_ranks(2, {}, TP2, CP2)
def test_bf16_keeps_master_weights_in_fp32(groups):
    """Rates far below bf16's resolution still add up, which they could not in the bf16 weights themselves."""
    _, norms, _ = train_plainly(1)
    wrapped, optimizer = make(groups, torch.bfloat16, lr=1e-4, min_lr=1e-4, decay="constant", warmup_steps=0)
    assert all(parameter.dtype == torch.bfloat16 for parameter in wrapped.module.parameters())
    assert all(parameter.main_grad.dtype == torch.float32 for parameter in wrapped.module.parameters())
    before = [parameter.clone() for parameter in wrapped.module.parameters()]
    for step in range(30):
        _, norm, _ = take_step(wrapped, optimizer, 0, groups)
        if step == 0:
            assert abs(norm / norms[0] - 1) < 2e-2
    masters = [p for group in optimizer.inner.param_groups for p in group["params"]]
    assert all(master.dtype == torch.float32 for master in masters)
    weight_before, weight = before[0].float(), wrapped.module.embed.weight.float()
    moved = (weight - weight_before).abs().mean()
    assert 1e-3 < moved < 5e-3, moved  # 30 steps of at most 1e-4


@on_ranks(2, {}, TP2)
def test_an_fp16_overflow_skips_the_step_on_every_rank_and_halves_the_scale(groups):
    _, norms, _ = train_plainly(1)
    wrapped, optimizer = make(groups, torch.float16, initial_loss_scale=2.0**30)
    assert optimizer.scales_loss and optimizer.lowers_loss_scale
    before = [parameter.detach().clone() for parameter in wrapped.module.parameters()]
    scales, taken = [optimizer.loss_scale], False
    while not taken:
        taken, norm, _ = take_step(wrapped, optimizer, 0, groups)
        scales.append(optimizer.loss_scale)
        same = [torch.equal(p, old) for p, old in zip(wrapped.module.parameters(), before, strict=True)]
        assert taken or (math.isnan(norm) and all(same)), (norm, scales)
    assert not all(same)
    overflows = len(scales) - 2
    # the first overflow is forgiven
    assert scales == [2.0**30, *(2.0 ** (30 - place) for place in range(overflows)), 2.0 ** (31 - overflows)]
    assert overflows > 2 and abs(norm / norms[0] - 1) < 1e-2


@on_ranks(2, TP2)
def test_replicated_parameters_stay_equal_on_tensor_ranks(groups):
    from megacogvx.parallel.data_parallel import sum_over_tokens
    from megacogvx.parallel.tensor_parallel import is_cut

    wrapped, optimizer = make(groups)
    take_step(wrapped, optimizer, 0, groups)
    for name, parameter in wrapped.module.named_parameters():
        if not is_cut(parameter):
            assert torch.equal(sum_over_tokens(parameter, groups), 2 * parameter.detach()), name


@on_ranks(2, {})
def test_a_step_with_nan_changes_nothing_on_any_rank(groups):
    wrapped, optimizer = make(groups)
    take_step(wrapped, optimizer, 0, groups)
    before = [parameter.detach().clone() for parameter in wrapped.module.parameters()]

    def spoil(mine):
        if groups.rank == 1:
            mine[0].x_SP[0, 0] = math.nan
        return mine

    taken, norm, _ = take_step(wrapped, optimizer, 1, groups, pick=spoil)
    assert not taken and math.isnan(norm)
    for parameter, old in zip(wrapped.module.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert take_step(wrapped, optimizer, 2, groups)[0]


@on_ranks(2, {})
def test_forward_only_gives_metrics_and_no_gradients(groups):
    from megacogvx.parallel.data_parallel import forward_backward

    wrapped, optimizer = make(groups)
    optimizer.zero_grad()

    def step(iterator, model):
        out, loss_function = forward_step(iterator, model)
        assert not out.requires_grad
        return out, loss_function

    mine = packs(0, 2, device=groups.device)
    metrics = forward_backward(step, mine, wrapped, groups, num_microbatches=2, forward_only=True)
    assert len(metrics) == 2
    assert all(not parameter.main_grad.any() for parameter in wrapped.module.parameters())


@on_ranks(2, {}, TP2, CP2)
def test_sums_over_the_ranks_that_hold_different_tokens(groups):
    from megacogvx.parallel.data_parallel import max_over_ranks, sum_over_data_and_context, sum_over_tokens
    from megacogvx.parallel.groups import any_rank, broadcast_json

    value = torch.tensor([1.0, groups.rank])
    assert sum_over_tokens(value, groups).tolist() == [2.0, 1.0]
    expected = [1.0, float(groups.rank)] if groups.tensor[1] == 2 else [2.0, 1.0]
    assert sum_over_data_and_context(value, groups).tolist() == expected
    assert max_over_ranks(value, groups).tolist() == [1.0, 1.0]
    assert value.tolist() == [1.0, groups.rank]
    assert broadcast_json({"rank": groups.rank}, groups) == {"rank": 0}
    assert any_rank(groups.rank == 1, groups) and not any_rank(False, groups)
