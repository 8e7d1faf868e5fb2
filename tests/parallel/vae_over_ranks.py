"""What the tests of the VAE over ranks share: a small model, compared with one rank that has the whole clip."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megacogvx import draws
from megacogvx.testing.tolerance import assert_all_close, assert_close, relative_error

OUTPUT_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
BOUNDS = {torch.float32: (OUTPUT_BOUND, GRADIENT_BOUND), torch.float64: (1e-11, 1e-10)}
SMALL = {"block_out_channels": (4, 8, 8, 12), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
FRAMES = (9, 13, 17, 21, 25)  # 3 to 7 latent frames; of three and four ranks most hold a single one
HEIGHT, WIDTH, RATIO = 16, 24, 4
RATE = 0.1  # so large that the step is well above the rounding of the weights
ADAM_EPS = 1e-3  # so large that the first step is no mere sign: it sees a wrong scale, and doesn't blow up rounding


def make_model(**settings):
    from megacogvx.config import build_config
    from megacogvx.models.vae import CogVideoXVAE, VAEConfig

    model = CogVideoXVAE(build_config(VAEConfig, {**SMALL, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 12
            norm = float("norm" in name and name.endswith("weight") and parameter.dim() == 1)
            parameter.copy_(draws.normal(tuple(parameter.shape), 0, name) * fan_in**-0.5 + norm)
    return model


def make_video(frames, batch=1):
    steps = draws.normal((batch, 3, frames, HEIGHT, WIDTH), 0, "steps")
    return (draws.normal((batch, 3, 1, HEIGHT, WIDTH), 0, "still") + 0.3 * steps.cumsum(2)).tanh()


def code(model, x, shard, decode):
    return model.decode(x, shard=shard) if decode else model.encode(x, shard=shard)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def coder_input(config, frames, decode):
    """Return a whole clip of `frames` pixel frames, or its latents."""
    if decode:
        shape = (1, config.latent_channels, config.latent_frames(frames), HEIGHT // 8, WIDTH // 8)
        return draws.normal(shape, 0, "latents")
    return make_video(frames)


def coder_shards(config, frames, decode, group):
    """Return which frames this rank has, of what goes in and of what comes out."""
    from megacogvx.parallel.frame_parallel import shard_latents, shard_pixels

    if not decode:
        shard = shard_pixels(frames, config.temporal_compression_ratio, group)
        return shard, shard.halved(config.temporal_levels)
    shard = out_shard = shard_latents(config.latent_frames(frames), group)
    for _ in range(config.temporal_levels):
        out_shard = out_shard.doubled()
    return shard, out_shard


def run_coder(model, whole, decode, shards=None):
    """Return the frames that are here and what comes of them, after the gradients of one sum over the whole result."""
    parameter = next(model.parameters())
    x = whole if shards is None else shards[0].cut(whole)
    x = x.to(parameter.device, parameter.dtype, copy=True).requires_grad_()
    y = code(model, x, None if shards is None else shards[0], decode)
    shape = (*y.shape[:2], y.shape[2] if shards is None else shards[1].total, *y.shape[3:])
    weights = draws.normal(shape, 0, "loss") / math.prod(shape)
    weights = weights if shards is None else shards[1].cut(weights)
    (y * weights.to(y)).sum().backward()
    if shards is not None:
        for gradient in gradients(model).values():
            dist.all_reduce(gradient, group=shards[0].group)
    return x, y


def check_coder(groups, frames, decode, dtype=torch.float32, **settings):
    """Run encoder or decoder on the whole clip and on the ranks' frames; compare output, gradients and new weights.

    The whole clip is computed in fp64. One rank in fp32 would be no better a reference than the ranks are: where a
    gradient nearly cancels (that of a decoder's bias at 25 frames) it is 7e-5 off, and four ranks in fp32 are 5e-5 off.
    """
    output_bound, gradient_bound = BOUNDS[dtype]
    whole_model, model = (make_model(**settings).to(groups.device, kind) for kind in (torch.float64, dtype))
    whole = coder_input(model.config, frames, decode)
    shard, out_shard = coder_shards(model.config, frames, decode, groups.context_group)
    x, expected = run_coder(whole_model, whole, decode)
    mine, actual = run_coder(model, whole, decode, (shard, out_shard))
    name = f"{'decode' if decode else 'encode'} {frames} frames over {groups.context_group.size()} ranks:"
    assert_close(actual, out_shard.cut(expected), output_bound, name)

    with torch.no_grad():  # another way through the convolutions and norms: in place, the exchange before it
        before = mine.clone()
        assert_close(code(model, mine, shard, decode), out_shard.cut(expected), output_bound, f"{name} without a graph")
        assert torch.equal(mine, before), f"{name} the input was overwritten"

    assert_close(mine.grad, shard.cut(x.grad), gradient_bound, f"{name} gradient of the input")
    assert_all_close(gradients(model), gradients(whole_model), gradient_bound)

    torch_step(whole_model)
    torch_step(model)
    assert_all_close(weights_of(model), weights_of(whole_model), output_bound)


def check_rounding(groups, frames, decode):
    """In fp32 the ranks' gradients are as near to the fp64 ones as those of one rank: within twice its error."""
    exact, single, model = (make_model().to(groups.device, kind) for kind in (torch.float64, *[torch.float32] * 2))
    whole = coder_input(model.config, frames, decode)
    run_coder(exact, whole, decode)
    run_coder(single, whole, decode)
    run_coder(model, whole, decode, coder_shards(model.config, frames, decode, groups.context_group))
    of_one, of_all = (
        max(relative_error(gradient, exact.get_parameter(name).grad) for name, gradient in gradients(each).items())
        for each in (single, model)
    )
    print(f"largest error of a gradient: {of_one:.2g} on one rank, {of_all:.2g} on {groups.context[1]}")
    assert of_all <= 2 * of_one


def check_all(groups, frames_of=FRAMES, **settings):
    for frames in frames_of:
        if (frames - 1) // RATIO + 1 >= groups.context[1]:
            check_coder(groups, frames, decode=False, **settings)
            check_coder(groups, frames, decode=True, **settings)


def alone(groups):
    """Groups of this rank by itself, for the reference."""
    solo = [dist.new_group([rank]) for rank in range(groups.world_size)][groups.rank]
    collection = SimpleNamespace(tp=solo, cp=solo, dp=solo, dp_cp=solo)
    place = dict(tensor=(0, 1), context=(0, 1), data=(0, 1))
    return dataclasses.replace(groups, collection=collection, rank=0, world_size=1, **place)


def vae_step(model, groups, net):
    from megacogvx.models.vae import VAELoss, VAELossConfig
    from megacogvx.training.vae_step import VAEStep

    loss = VAELoss(VAELossConfig(kl_weight=0.1, perceptual="random_net" if net else "none")).to(groups.device)
    return VAEStep(model.config, loss, 7, groups, torch.float32)


def check_step(groups, frames, clips=2, net=False):
    """Take one optimizer step with megatron-core, and one with torch on a rank of its own; compare all there is.

    With the random `net` in the loss, rounding of 1e-7 in the pixels flips ReLUs, which moves some gradients by 1e-4.
    """
    from megacogvx.data.clip_loader import ClipBatch
    from megacogvx.parallel.data_parallel import forward_backward, sum_over_tokens

    step, video = 3, make_video(frames, clips)
    reference, single = make_model().to(groups.device), alone(groups)
    before = weights_of(reference)
    output, score = vae_step(reference, single, net)(iter([ClipBatch(step, video)]), reference)
    loss, count, expected_metrics = score(output)
    (loss / count).backward()
    torch_step(reference)

    model = make_model()
    ddp, optimizer = train_ready(model, groups)
    optimizer.zero_grad()
    optimizer.schedule(0)
    batch = ClipBatch(step, video[groups.data[0] :: groups.data[1]])
    metrics = forward_backward(vae_step(model, groups, net), [batch], ddp, groups, num_microbatches=1)
    sums = sum_over_tokens(metrics[0]["sums"], groups)
    assert_close(sums.cpu(), expected_metrics["sums"].cpu(), 1e-5, "sums for the log")
    taken, norm = optimizer.step()
    squares = sum(float(p.grad.double().square().sum()) for p in reference.parameters())
    assert taken and abs(norm / squares**0.5 - 1) < GRADIENT_BOUND

    check_new_weights(model, reference, before, 2e-3 if net else GRADIENT_BOUND)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train_ready(model, groups):
    """Return the data-parallel wrapper and an optimizer like `torch_step`."""
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.parallel.data_parallel import wrap
    from megacogvx.parallel.megatron import plain_core_config
    from megacogvx.parallel.optimizer import build_optimizer

    parallel = ParallelConfig(context_parallel_size=groups.context[1])
    ddp = wrap(model, plain_core_config(parallel, groups, torch.float32), groups)
    settings = dict(lr=RATE, min_lr=RATE, total_steps=10, decay="constant", weight_decay=0.0, clip_grad=0.0)
    return ddp, build_optimizer(ddp, groups, betas=(0.9, 0.999), eps=ADAM_EPS, **settings)


def torch_step(model):
    torch.optim.AdamW(model.parameters(), lr=RATE, eps=ADAM_EPS, weight_decay=0.0).step()


def check_new_weights(model, reference, before, bound):
    """Compare what one optimizer step changed; elements whose gradient is mere rounding are left out."""
    left_out = total = 0
    for name, parameter in model.named_parameters():
        gradient = reference.get_parameter(name).grad
        counts = gradient.abs() >= 1e-6 * gradient.abs().max()
        left_out, total = left_out + int((~counts).sum()), total + counts.numel()
        actual, expected = parameter.detach() - before[name], reference.get_parameter(name).detach() - before[name]
        assert_close(actual[counts], expected[counts], bound, f"step of {name}")
    print(f"left out: {left_out} of {total}")
    assert left_out <= 1e-3 * total
