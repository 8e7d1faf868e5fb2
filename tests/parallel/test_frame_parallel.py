"""The VAE with its frames on several ranks equals one rank with the whole clip: outputs, gradients, trained weights."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megacogvx.errors import ConfigError, DataError
from megacogvx.testing.spawn import on_ranks
from megacogvx.testing.tolerance import assert_close

sys.path.append(str(Path(__file__).parent))

from vae_over_ranks import (
    RATIO,
    SMALL,
    alone,
    check_all,
    check_coder,
    check_new_weights,
    check_step,
    make_model,
    make_video,
    torch_step,
    train_ready,
    vae_step,
    weights_of,
)

GAN = {"perceptual": "none", "kl_weight": 0.1, "gan_weight": 0.7, "gan_weight_limit": 1e3, "gan_start_step": 3}


def make_discriminator():
    from megacogvx.models.vae.discriminator import Discriminator, DiscriminatorConfig, initialize_discriminator

    model = Discriminator(DiscriminatorConfig(channels=4, layers=2, norm_num_groups=2), 3, 2)
    initialize_discriminator(model, 5)
    with torch.no_grad():
        model.conv_out.weight *= 8  # so that some logits lie beyond the hinge; else the bias's gradient is zero
    return model


def gan_reference(model, discriminator, video, noise, settings):
    """Take both steps of a training step with a GAN term on whole clips, in plain torch; return the logged numbers."""
    from megacogvx.models.vae import VAELoss, VAELossConfig

    losses = VAELoss(VAELossConfig(**settings))
    reconstruction = model(video, noise)
    total, terms, nll = losses(video, *reconstruction)
    gan = -discriminator(reconstruction.video_BCTHW).mean()
    last = model.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, gan)]
    scale = (norms[0] / (norms[1] + 1e-4)).clamp(max=settings["gan_weight_limit"]).detach()
    (total + settings["gan_weight"] * scale * gan).backward()
    torch_step(model)
    discriminator.zero_grad()
    real, fake = discriminator(video), discriminator(reconstruction.video_BCTHW.detach())
    hinge = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    hinge.backward()
    torch_step(discriminator)
    loss = total + settings["gan_weight"] * scale * gan
    names = (
        "loss", "l1", "kl", "gan", "gan_scale", "loss_without_gan", "discriminator", "logits_real", "logits_fake"
    )  # fmt: skip
    numbers = (loss, terms["l1"], terms["kl"], gan, scale, total, hinge, real.mean(), fake.mean())
    return {name: number.detach() for name, number in zip(names, numbers, strict=True)}


def check_gan_step(groups, frames, clips=2, **changes):
    """Train VAE and discriminator for a step on the ranks' frames, and on whole clips; compare all there is.

    Return what the GAN term was scaled by.
    """
    from megacogvx.data.clip_loader import ClipBatch
    from megacogvx.models.vae import VAELoss, VAELossConfig
    from megacogvx.parallel.data_parallel import forward_backward, sum_over_tokens
    from megacogvx.training.adversary import Adversary
    from megacogvx.training.vae_step import VAEStep

    step, video, settings = 3, make_video(frames, clips).to(groups.device), {**GAN, **changes}
    reference, judge = make_model().to(groups.device), make_discriminator().to(groups.device)
    model, discriminator = make_model(), make_discriminator()
    before = weights_of(reference), weights_of(judge)
    noise = vae_step(reference, alone(groups), False).noise(ClipBatch(step, video))
    expected = gan_reference(reference, judge, video, noise.to(video), settings)

    ddp, optimizer = train_ready(model, groups)
    adversary = Adversary(VAELossConfig(**settings), *train_ready(discriminator, groups), groups)
    forward_step = VAEStep(model.config, VAELoss(VAELossConfig(**settings)), 7, groups, torch.float32, adversary)
    optimizer.zero_grad()
    optimizer.schedule(0)
    batch = ClipBatch(step, video[groups.data[0] :: groups.data[1]])
    metrics = forward_backward(forward_step, [batch], ddp, groups, num_microbatches=1)
    row = forward_step.read_log_sums(sum_over_tokens(metrics[0]["sums"], groups))
    assert optimizer.step()[0]
    row |= adversary.step(step)
    assert row.pop("discriminator_grad_norm") > 0
    assert row.keys() == expected.keys()
    for name, number in expected.items():
        assert_close(torch.tensor(row[name]), number.cpu(), 1e-5, name)
    check_new_weights(model, reference, before[0], 5e-4)
    check_new_weights(discriminator, judge, before[1], 5e-4)
    return row["gan_scale"]


@on_ranks(2, {"context_parallel_size": 2})
def test_two_ranks_equal_one(groups):
    check_all(groups)


@on_ranks(2, {"context_parallel_size": 2})
def test_other_compressions(groups):
    for frames in (16, 17):
        check_coder(groups, frames, False, temporal_compression_ratio=1)
        check_coder(groups, frames, True, temporal_compression_ratio=1, temporal_kernel_size=1)
    check_coder(groups, 17, False, temporal_compression_ratio=8)
    check_coder(groups, 17, True, temporal_compression_ratio=8)
    check_coder(groups, 7, False, temporal_compression_ratio=2)


@on_ranks(2, {"context_parallel_size": 2})
def test_one_training_step_on_two_ranks(groups):
    check_step(groups, 9)
    check_step(groups, 9, net=True)
    check_step(groups, 1)  # an image, which both ranks compute


@on_ranks(2, {}, {"context_parallel_size": 2})
def test_one_step_with_a_discriminator_on_two_ranks(groups):
    assert 0.01 < check_gan_step(groups, 17) < GAN["gan_weight_limit"]
    if groups.context[1] > 1:
        assert check_gan_step(groups, 9, gan_weight_limit=0.01) == pytest.approx(0.01), "the limit is applied"
    check_gan_step(groups, 1)


@on_ranks(3, {"context_parallel_size": 3})
def test_three_ranks_equal_one(groups):
    check_all(groups)


@on_ranks(3, {"context_parallel_size": 3})
def test_frames_in_pairs_on_three_ranks(groups):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megacogvx.models.vae.winograd.FEWEST_CHANNELS", 1)
        for frames, decode in ((9, True), (21, False), (25, True)):  # one latent frame a rank; odd and even shares
            check_coder(groups, frames, decode)


@on_ranks(3, {"context_parallel_size": 3})
def test_one_training_step_on_three_ranks(groups):
    check_step(groups, 17)


@on_ranks(4, {"context_parallel_size": 4})
def test_four_ranks_equal_one(groups):
    check_all(groups, dtype=torch.float64)
    check_all(groups)


@on_ranks(4, {"context_parallel_size": 2}, {"context_parallel_size": 4})
def test_one_training_step_on_four_ranks(groups):
    check_step(groups, 25)


@on_ranks(4, {"context_parallel_size": 2}, {"context_parallel_size": 4})
def test_one_step_with_a_discriminator_on_four_ranks(groups):
    check_gan_step(groups, 25)


@on_ranks(8, {"context_parallel_size": 8})
def test_eight_ranks_equal_one(groups):
    check_coder(groups, 33, decode=False)
    check_coder(groups, 41, decode=True)
    check_step(groups, 33, clips=1)


@on_ranks(3, {"context_parallel_size": 3})
def test_bytes_exchanged(groups):
    """Every convolution sends two frames of its input to the next rank, every normalisation two numbers per group."""
    from megacogvx.models.vae.causal_conv import CausalConv3d
    from megacogvx.parallel.frame_parallel import shard_pixels

    model, shard = make_model().to(groups.device), shard_pixels(17, RATIO, groups.context_group)
    halo_bytes, norms = [], [name for name, _ in model.encoder.named_modules() if "norm" in name]
    for module in model.encoder.modules():
        if isinstance(module, CausalConv3d):
            module.register_forward_pre_hook(lambda _, args: halo_bytes.append(2 * args[0][:, :, 0].nbytes))
    video = shard.cut(make_video(17)).to(groups.device).clone().requires_grad_()
    with counted_bytes() as forward:
        moments = model.encode(video, shard=shard)
    with counted_bytes() as backward:
        moments.square().sum().backward()

    convolutions = sum(isinstance(module, CausalConv3d) for module in model.encoder.modules())
    rank, statistics = groups.context[0], 2 * SMALL["norm_num_groups"]
    assert len(halo_bytes) == convolutions > 10
    assert forward.sent == halo_bytes * (rank < 2), "in each layer two frames of its input"
    assert backward.sent == halo_bytes[::-1] * (rank > 0), "and their gradient back"
    assert forward.count == {
        "isend": sum(halo_bytes) * (rank < 2),
        "irecv": sum(halo_bytes) * (rank > 0),
        "all_gather_into_tensor": 4 * (statistics + 1) * len(norms),
        "all_reduce": 0,
    }
    assert backward.count == {
        "isend": sum(halo_bytes) * (rank > 0),
        "irecv": sum(halo_bytes) * (rank < 2),
        "all_gather_into_tensor": 0,
        "all_reduce": 4 * statistics * len(norms),
    }


class counted_bytes:  # noqa: N801
    """Count what this rank gives to, and takes from, messages and collectives, in bytes, by name: `count`."""

    def __enter__(self):
        self.patch, self.count = pytest.MonkeyPatch(), Counter(isend=0, irecv=0, all_gather_into_tensor=0, all_reduce=0)
        self.sent = []  # bytes of each message that left
        messages, gather, reduce = dist.batch_isend_irecv, dist.all_gather_into_tensor, dist.all_reduce

        def batch_isend_irecv(ops):
            for op in ops:
                self.count[op.op.__name__] += op.tensor.nbytes
                self.sent += [op.tensor.nbytes] if op.op.__name__ == "isend" else []
            return messages(ops)

        def all_gather_into_tensor(output, tensor, **settings):
            self.count["all_gather_into_tensor"] += tensor.nbytes
            return gather(output, tensor, **settings)

        def all_reduce(tensor, **settings):
            self.count["all_reduce"] += tensor.nbytes
            return reduce(tensor, **settings)

        for function in (batch_isend_irecv, all_gather_into_tensor, all_reduce):
            self.patch.setattr(dist, function.__name__, function)
        # Between GPUs of one machine halos are written into the neighbour's memory, where nothing counts them.
        self.patch.setattr("megacogvx_kernels.causal_halo.exchange.mailbox_of", lambda *_: None)
        return self

    def __exit__(self, *_):
        self.patch.undo()


@on_ranks(2, {"context_parallel_size": 2})
def test_interior_frames_are_convolved_while_the_halo_travels(groups):
    from megacogvx.models.vae.causal_conv import CausalConv3d
    from megacogvx.models.vae.frames import FrameSpan
    from megacogvx.parallel.frame_parallel import shard_pixels
    from megacogvx_kernels.causal_halo import HaloExchange

    events, shard = [], shard_pixels(17, RATIO, groups.context_group)
    post, finish, conv3d = HaloExchange._post, HaloExchange._finish, F.conv3d

    def convolve(x, *arguments, **settings):
        events.append(f"convolve {x.shape[2]}")
        y = conv3d(x, *arguments, **settings)
        if y.requires_grad:
            y.grad_fn.register_hook(lambda *_: events.append(f"gradient {x.shape[2]}"))
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HaloExchange, "_post", lambda *a, **k: (events.append("post"), post(*a, **k))[1])
        patch.setattr(HaloExchange, "_finish", lambda *a: (events.append("wait"), finish(*a))[1])
        patch.setattr(F, "conv3d", convolve)
        x = shard.cut(make_video(17)).to(groups.device).clone().requires_grad_()
        convolution = CausalConv3d(3, 4, 3).to(groups.device)
        y = convolution(x, FrameSpan.of(shard))
        assert events == ["post", f"convolve {shard.count}", "wait", "convolve 4"]
        events.clear()
        y.sum().backward()
        assert events == ["gradient 4", "post", f"gradient {shard.count}", "wait"]
        events.clear()
        with torch.no_grad():
            convolution(x, FrameSpan.of(shard))
        assert events == ["post", f"convolve {shard.count}", "wait", "convolve 4"], "without a graph"


@on_ranks(2, {"context_parallel_size": 2})
def test_held_out_psnr_and_pictures_are_those_of_the_whole_clip(groups, folder):
    from megacogvx.data.images import read_image
    from megacogvx.training.validation import HeldOutClips

    clips = [(None, make_video(17)), (None, make_video(9))]
    loader = SimpleNamespace(held_out_videos=lambda: iter(clips))
    model = make_model().to(groups.device)
    single = HeldOutClips(loader, model, folder / f"single{groups.rank}", alone(groups)).measure(0)
    assert abs(HeldOutClips(loader, model, folder, groups).measure(0)["psnr"] - single["psnr"]) < 1e-4
    dist.barrier()
    for name in ("clip0.png", "clip1.png"):
        paths = (folder / "reconstructions" / name, folder / "single0" / "reconstructions" / name)
        actual, expected = (read_image(path).int() for path in paths)
        assert (actual - expected).abs().max() <= 1, f"{name}: more than rounding"


@on_ranks(2, {"context_parallel_size": 2})
def test_what_cannot_be_split_is_named(groups):
    from megacogvx.models.vae.tiling import CHUNKED
    from megacogvx.parallel.frame_parallel import shard_latents, shard_pixels

    with pytest.raises(DataError, match=r"16 frames .*4k \+ 1 .*frames that works: 17; .*for 13 frames: 4"):
        shard_pixels(16, RATIO, groups.context_group)
    with pytest.raises(DataError, match=r"1 latent frames .*over 2 ranks.*works: 1"):
        shard_latents(1, groups.context_group)
    model, shard = make_model(), shard_pixels(17, RATIO, groups.context_group)
    with pytest.raises(DataError, match=rf"17 frames were given .*give {shard.count}"):
        model.encode(make_video(17), shard=shard)
    with pytest.raises(ConfigError, match="exclude each other"):
        model.encode(shard.cut(make_video(17)), CHUNKED, shard=shard)
    odd = shard_pixels(13, RATIO, groups.context_group)
    with pytest.raises(DataError, match="training clip of 13 frames"):
        model(odd.cut(make_video(13)), shard=odd)
