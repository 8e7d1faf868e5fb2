"""What we export makes, in diffusers' own pipelines, the video that our sampler makes: same weights, noise and text."""

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from diffusers.schedulers import scheduling_dpm_cogvideox

from megacogvx import draws
from megacogvx.conversion.convert import convert
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.inference.denoise import Denoiser, SamplingSettings
from megacogvx.inference.load import TransformerCheckpoint, load_transformer, load_vae
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.models.vae.tiling import CHUNKED
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.drawn_checkpoint import FRAMES, HEIGHT, TEXT_LENGTH, TEXT_WIDTH, WIDTH, tiny_parts, tiny_settings
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder
from megacogvx.testing.tolerance import assert_close

BOUND = 1e-4
PROMPT, STEPS, GUIDANCE, SEED = "a dog runs along a beach", 4, 6.0, 11


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def export(root, variant, text_encoder=None, **conventions):
    """Write a random model as our run and as a diffusers folder; returns both."""
    parts = tiny_parts(variant, **conventions)
    ours = convert(parts, "megacogvx", root / "ours", check=False)
    theirs = convert(
        parts, "diffusers", root / "theirs", max_shard_bytes=100_000, text_encoder=text_encoder, check=False
    )
    return ours, theirs


def our_video(folder, text_LE, null_LE, sampler, groups):
    """Return pixels `[T, 3, H, W]` in [0, 1], decoded by chunks as the pipelines do, and the noise that was drawn."""
    found = TransformerCheckpoint.find(folder / "transformer")
    denoiser = Denoiser(
        load_transformer(folder / "transformer", groups, torch.float32), NoiseSchedule(found.diffusion), groups
    )
    settings = SamplingSettings(STEPS, sampler, "constant", GUIDANCE, SEED, found.conventions.repeated_frames)
    vae = load_vae(folder / "vae", torch.device("cpu"), torch.float32)
    channels, frames, height, width = vae.config.latent_shape(FRAMES, HEIGHT, WIDTH)
    latents_TCHW = denoiser.sample(text_LE, null_LE, (frames, channels, height, width), settings)
    with torch.no_grad():
        video = vae.decode((latents_TCHW / found.scaling_factor).transpose(0, 1)[None], CHUNKED)[0]
    return (video.transpose(0, 1) / 2 + 0.5).clamp(0, 1)


def noise(what, *step, copies=0):
    """The noise that our sampler draws, `[1, T, C, H, W]`, the repeated frames in front included."""
    return draws.normal_frames(range(-copies, 3), (4, 4, 6), SEED, f"sampling {what}", 0, *step)[None]


def give_noise(monkeypatch, copies):
    """Let the DPM scheduler, which draws for itself, take our noise of its step."""
    original, at = CogVideoXDPMScheduler.step, {"step": -1}

    def step(self, *args, **kwargs):
        at["step"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CogVideoXDPMScheduler, "step", step)
    monkeypatch.setattr(
        scheduling_dpm_cogvideox, "randn_tensor", lambda *_, **__: noise("step", at["step"], copies=copies)
    )


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b"])
def test_pipeline_on_our_export_makes_our_video(tmp_path, monkeypatch, variant, groups):
    ours, theirs = export(tmp_path, variant)
    sampler = tiny_settings(variant).conventions.sampler
    copies = 1 if variant == "1.5-5b" else 0  # 3 latent frames make 4 with a repeated one
    give_noise(monkeypatch, copies)
    text, null = draws.normal((TEXT_LENGTH, TEXT_WIDTH), 1, "text"), torch.zeros(TEXT_LENGTH, TEXT_WIDTH)
    pipe = CogVideoXPipeline.from_pretrained(theirs, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt_embeds=text[None], negative_prompt_embeds=null[None], latents=noise("start", copies=copies),
        num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        output_type="pt",
    ).frames[0]  # fmt: skip
    actual = our_video(ours, text, null, sampler, groups)
    assert expected.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert float(expected.std()) > 0.05  # a picture, not one colour
    assert_close(actual, expected, BOUND, "video")


def test_text_encoder_and_empty_prompt_travel(tmp_path, groups):
    """A prompt as text through the exported tokenizer and T5; what stands for no prompt is the empty one, as there."""
    encoder = build_tiny_text_encoder(tmp_path / "t5", [PROMPT, "a cat sleeps on a sofa"], width=TEXT_WIDTH)
    ours, theirs = export(tmp_path, "2b", text_encoder=encoder, unconditional_text="empty")
    texts, _ = TextEncoder.from_folder(theirs, TEXT_LENGTH).encode([PROMPT, ""])
    pipe = CogVideoXPipeline.from_pretrained(theirs)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT, latents=noise("start"), num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, max_sequence_length=TEXT_LENGTH, output_type="pt",
    ).frames[0]  # fmt: skip
    assert_close(our_video(ours, texts[0], texts[1], "ddim", groups), expected, BOUND, "video")


@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-5b-i2v"])
def test_image_to_video_pipeline_runs_on_our_export(tmp_path, variant):
    _, theirs = export(tmp_path, variant)
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(theirs, text_encoder=None, tokenizer=None)
    assert pipe.vae.config.invert_scale_latents == (variant == "1.5-5b-i2v")  # published
    pipe.set_progress_bar_config(disable=True)
    text = draws.normal((1, TEXT_LENGTH, TEXT_WIDTH), 1, "text")
    frames = pipe(
        image=draws.normal((1, 3, HEIGHT, WIDTH), 1, "image").clamp(-1, 1), prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text), num_frames=FRAMES, height=HEIGHT, width=WIDTH,
        num_inference_steps=2, output_type="pt",
    ).frames[0]  # fmt: skip
    assert frames.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert bool(frames.isfinite().all())


def test_video_to_video_pipeline_runs_on_our_export(tmp_path):
    _, theirs = export(tmp_path, "5b")
    pipe = CogVideoXVideoToVideoPipeline.from_pretrained(theirs, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    text = draws.normal((1, TEXT_LENGTH, TEXT_WIDTH), 1, "text")
    video = draws.normal((FRAMES, 3, HEIGHT, WIDTH), 1, "video").clamp(-1, 1)
    frames = pipe(
        video=[video], prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), height=HEIGHT,
        width=WIDTH, num_inference_steps=4, strength=0.5, output_type="pt",
    ).frames[0]  # fmt: skip
    assert bool(frames.isfinite().all())
