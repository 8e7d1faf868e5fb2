"""What a GPU would meet, on a machine without one: tensors that have a shape, a dtype and a device, and no values.

Of torch's two kinds "meta" tensors go forward and backward, and fake ones on "cuda" forward, through the branches for
GPUs, which torch without CUDA can't take backward. Operations on two devices raise with both, and so does whatever asks
the device for a value: there the host would wait until the GPU has done all that it was given.
"""

import contextlib
import ctypes
import dataclasses
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily

from megacogvx.models.vae import CHUNKED, WHOLE, Coding, CogVideoXVAE, VAEConfig, VAELoss, VAELossConfig, gaussian
from megacogvx.models.vae import model as vae_model
from megacogvx.models.vae.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
)
from megacogvx_kernels import compiled, transfer
from megacogvx_kernels.adaln import runs

META, GPU = torch.device("meta"), torch.device("cuda", 0)
BF16 = torch.bfloat16
VAE = VAEConfig(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=2, latent_channels=4)
CODINGS = {"whole": WHOLE, "chunked": CHUNKED, "tiled": Coding.of("tiled", tile=(48, 40))}


@contextlib.contextmanager
def _guard_for_cuda():
    """Let torch that is built without CUDA slice a tensor "on cuda": its guard of the device does nothing.

    Builds with CUDA have one (`FakeTensorMode` sees to it); here that of meta tensors stands for it, in c10's table of
    guards by device type (`c10/core/impl/DeviceGuardImplInterface.h`).
    """
    if torch.backends.cuda.is_built():
        yield
        return
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 32).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    types = torch._C._autograd.DeviceType
    guards[types.CUDA.value] = guards[types.Meta.value]
    try:
        yield
    finally:
        guards[types.CUDA.value] = None


@pytest.fixture
def gpu(monkeypatch):
    """The mode in which tensors are fake; what `to_device` sends to the GPU is fake from there on."""
    mode = FakeTensorMode()

    def queue_copy(tensor, device):
        with mode:  # what is made inside it, as the loss's weights are, is fake on the host already
            return (mode.from_tensor(tensor) if type(tensor) is torch.Tensor else tensor).to(device)

    monkeypatch.setattr(transfer, "_queue_copy", queue_copy)

    def on_the_host(function):
        def call(*arguments):
            with unset_fake_temporarily():
                return function(*arguments)

        return call

    monkeypatch.setattr(runs, "_find", on_the_host(runs._find))  # what it computes is on the host
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    if "cpu" in compiled.available():  # their shapes on a GPU, too
        monkeypatch.setattr(compiled, "available", lambda: frozenset(("cpu", "cuda")))
        monkeypatch.setattr(compiled, "_runs_on", lambda device: True)
    with _guard_for_cuda():
        yield mode


def test_two_devices_and_a_waiting_host_are_found(gpu):
    with gpu:
        there = torch.zeros(3, device=GPU)
        with pytest.raises(DataDependentOutputException):
            bool(there.isfinite().all())
        with pytest.raises(RuntimeError, match=r"two (different )?devices"):
            there + torch.zeros(3)
    with pytest.raises(RuntimeError):
        float(torch.zeros(3, device=META).sum())
    with pytest.raises(RuntimeError):
        torch.zeros(3, device=META) + torch.zeros(3)


def test_the_host_remembers_what_it_sent(gpu):
    sent = torch.tensor([3, 1, 2])
    there = transfer.to_device(sent, GPU)
    assert there.device == GPU and transfer.on_host(there) is sent
    with gpu:
        there.add_(1)
        assert transfer.on_host(there) is not sent
    assert transfer.to_device(sent, "cpu") is sent and transfer.to_device(sent, META).is_meta


@pytest.mark.gpu
def test_what_is_sent_arrives():
    for sent in (torch.arange(10**6), torch.arange(10**6).bfloat16()):
        there = transfer.to_device(sent, torch.device("cuda", 0))
        assert torch.equal(there.cpu(), sent) and torch.equal(transfer.on_host(there), sent)
        there += 1
        assert torch.equal(transfer.on_host(there), sent + 1)


def _vae_parts(device):
    with device:
        model = CogVideoXVAE(VAE).to(BF16)
        loss = VAELoss(VAELossConfig(perceptual="random_net"))
        settings = DiscriminatorConfig(channels=4, norm_num_groups=2)
        judge = Discriminator(settings, 3, VAE.temporal_levels)
    return model, loss.to(device), judge.to(BF16)


@pytest.mark.parametrize("frames", [1, 17])
def test_a_step_of_the_vae_never_waits(frames):
    """Stage 1, the GAN term with its scale, and the discriminator's own loss, forward and backward in bf16."""
    model, loss, judge = _vae_parts(META)
    video = torch.empty(2, 3, frames, 32, 48, device=META, dtype=BF16)
    noise = torch.empty(2, *VAE.latent_shape(frames, 32, 48), device=META, dtype=BF16)
    made = model(video, noise)
    losses, logits = loss(video, *made), judge(made.video_BCTHW)
    last = model.get_parameter("decoder.conv_out.weight")
    terms = (losses.reconstruction, generator_hinge(logits))
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].float().norm() for term in terms]
    total = losses.total + adaptive_weight(*norms, 1e4) * terms[1]
    total.backward()
    discriminator_hinge(*judge(torch.cat([video, made.video_BCTHW.detach()])).chunk(2)).backward()
    assert total.dtype == torch.float32
    assert all(p.grad is not None and p.grad.is_meta for p in (*model.parameters(), *judge.parameters()))


@pytest.mark.parametrize("mode", CODINGS)
def test_coding_asks_for_a_value_once_at_the_start(mode, monkeypatch):
    """Only whether the input is finite."""
    with META:
        model = CogVideoXVAE(VAE).to(BF16)
    asked = []
    monkeypatch.setattr(vae_model, "_check_finite", lambda x, name: asked.append(name))
    with torch.no_grad():
        moments = model.encode(torch.empty(1, 3, 17, 64, 80, device=META, dtype=BF16), CODINGS[mode])
        video = model.decode(gaussian.mode(moments), CODINGS[mode])
    assert asked == ["video", "latents"] and video.shape == (1, 3, 17, 64, 80) and video.dtype == BF16


def _made_in_bf16():
    """Fake parameters can't be cast in their place."""
    torch.set_default_dtype(BF16)
    try:
        return CogVideoXVAE(VAE)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("frames", [1, 17])
def test_the_vae_stays_on_the_gpu(gpu, frames):
    """Forward alone: here norms and halos take the branches of a GPU."""
    with gpu, GPU:
        model = _made_in_bf16()
        video = torch.empty(2, 3, frames, 32, 48, dtype=BF16)
        made = model(video, torch.empty(2, *VAE.latent_shape(frames, 32, 48), dtype=BF16))
    assert {x.device for x in made} == {GPU} and {x.dtype for x in made} == {BF16}


@pytest.fixture(scope="module")
def groups():
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.parallel.groups import initialize, shutdown

    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def _pack(config):
    """Three samples of unequal size, one of them an image, as the loader hands them over: on the host."""
    from megacogvx.data.pack import Pack
    from megacogvx.models.transformer.rope import place_on_rope_grid
    from megacogvx.pack_layout import build_layout, place_sample

    sizes = ((1, 8, 12, 3), (2, 8, 12, 7), (3, 8, 12, 4))
    samples = [place_sample(number, *size, config.patch) for number, size in enumerate(sizes)]
    layout = place_on_rope_grid(build_layout(samples, config.patch, num_tokens=256), config)
    latents = [torch.zeros(t, h, w, 2 * config.out_channels) for t, h, w, _ in sizes]
    text = [torch.zeros(length, config.text_embed_dim, dtype=BF16) for *_, length in sizes]
    images = tuple(torch.zeros(8, 8, 3, dtype=torch.uint8) for _ in sizes)
    return Pack(layout, latents, text, step=0, place=0, images=images)


class _Images:
    """Image latents as the frozen VAE gives them: back on the host."""

    def drops(self, step, sample_id):
        return False

    def __call__(self, pixels_HW3, step, sample_id):
        return torch.zeros(4, 8, 12)


def _training_step(groups, variant, recompute, device, build):
    """Take a pack from the host to the loss, as a training does; returns model, loss and the divisor."""
    from megacogvx.diffusion.config import DiffusionConfig
    from megacogvx.diffusion.schedule import NoiseSchedule
    from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.testing.one_process import Setting
    from megacogvx.training.batch import BatchMaker
    from megacogvx.training.step import TransformerStep

    there = dataclasses.replace(groups, device=device)
    config = Setting(variant=variant, changes={"in_channels": 8}).config
    core = transformer_core(config, ParallelConfig(recompute=recompute), there, BF16)
    diffusion = DiffusionConfig(conditioning_dropout=0.0)
    maker = BatchMaker(diffusion, NoiseSchedule(diffusion), 0.7, 0, there, BF16, images=_Images())
    step, packs = TransformerStep(maker), iter([(_pack(config), [999, 400, 3])])
    with build, device:
        model = CogVideoXTransformer(config, core, there)
    batch = maker.prepare(*next(packs))
    for table in (batch.layout.sample_table, batch.layout.rope_grid, batch.layout.cu_seqlens):
        table(device)  # the first layer would make it of host integers, which are fake inside the mode
    with build:
        prediction = model(batch.video_SP, batch.text_SE, batch.timesteps_M, batch.layout)
        loss, count, metrics = step.loss(batch, prediction)
    assert {x.device for x in (prediction, loss, count, metrics["sums"])} == {device}
    assert (prediction.dtype, loss.dtype) == (BF16, torch.float32)
    return model, loss


STEPS = (("2b", "none"), ("5b", "selective"), ("5b_i2v", "keep_attention"), ("1_5_i2v", "full"))


@pytest.mark.parametrize(("variant", "recompute"), STEPS)
def test_a_step_of_the_transformer_never_waits(groups, variant, recompute):
    """From the loader's pack to every gradient: learned positions and rotation, temporal patches, an image beside."""
    model, loss = _training_step(groups, variant, recompute, META, contextlib.nullcontext())
    loss.backward()
    assert all(p.grad is not None and p.grad.is_meta and p.grad.dtype == BF16 for p in model.parameters())


@pytest.mark.parametrize(("variant", "recompute"), STEPS)
def test_the_transformer_stays_on_the_gpu(gpu, groups, variant, recompute):
    """Forward alone: here the compiled ops, the tables that are looked up, and the copies are those of a GPU."""
    _training_step(groups, variant, recompute, GPU, gpu)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_sampling_stays_on_its_device(groups, sampler):
    """Guidance, an image beside, repeated frames; then the average of the weights takes a step and is used."""
    from megacogvx.diffusion.config import DiffusionConfig
    from megacogvx.diffusion.schedule import NoiseSchedule
    from megacogvx.inference.denoise import Denoiser, SamplingSettings
    from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.testing.one_process import Setting
    from megacogvx.training.ema import WeightAverage

    there = dataclasses.replace(groups, device=META)
    config = Setting(variant="1_5_i2v", changes={"in_channels": 8}).config
    with META:
        model = CogVideoXTransformer(config, transformer_core(config, ParallelConfig(), there, BF16), there)
    denoiser = Denoiser(model, NoiseSchedule(DiffusionConfig()), there)
    average = WeightAverage(model, 0.9, there)
    average.update(0)
    with average.in_use():
        latents = denoiser.sample(
            torch.zeros(7, 24), torch.zeros(7, 24), (3, 4, 8, 12), SamplingSettings(3, sampler),
            image_CHW=torch.zeros(4, 8, 12), on_step=lambda: None,
        )  # fmt: skip
    assert latents.device == META and latents.dtype == torch.float32 and latents.shape == (3, 4, 8, 12)
