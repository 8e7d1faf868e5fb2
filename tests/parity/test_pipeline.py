"""What we export makes, in diffusers' own pipelines, the video that our sampler makes: same weights, noise and text."""

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from diffusers.models.autoencoders import vae as diffusers_vae
from diffusers.pipelines.cogvideo import pipeline_cogvideox_video2video
from diffusers.schedulers import scheduling_dpm_cogvideox

from megacogvx import draws
from megacogvx.conversion.convert import convert
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.inference.conditions import ConditionEncoder
from megacogvx.inference.denoise import Denoiser, SamplingSettings
from megacogvx.inference.load import TransformerCheckpoint, load_transformer, load_vae
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.models.vae.tiling import CHUNKED
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.drawn_checkpoint import FRAMES, HEIGHT, TEXT_LENGTH, TEXT_WIDTH, WIDTH, tiny_parts
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


def our_video(folder, text_LE, null_LE, groups, sampler=None, guidance="constant", image=None, video=None, **settings):
    """Return pixels `[T, 3, H, W]` in [0, 1]; the VAE codes by chunks, as the pipelines do.

    An image `[3, H, W]` is the first frame, a video `[3, T, H, W]` the start, both in [-1, 1].
    """
    found = TransformerCheckpoint.find(folder / "transformer").settings
    conventions = found.conventions
    settings = SamplingSettings(
        STEPS, sampler or conventions.sampler, guidance, GUIDANCE, SEED, conventions.repeated_frames, **settings
    )
    denoiser = Denoiser(
        load_transformer(folder / "transformer", groups, torch.float32), NoiseSchedule(found.diffusion), groups
    )
    vae = load_vae(folder / "vae", torch.device("cpu"), torch.float32)
    encoder = ConditionEncoder(vae, found.scaling_factor, conventions.image_latent_scale, CHUNKED)
    channels, frames, height, width = vae.config.latent_shape(
        FRAMES if video is None else video.shape[1], HEIGHT, WIDTH
    )
    latents_TCHW = denoiser.sample(
        text_LE, null_LE, (frames, channels, height, width), settings,
        image_CHW=None if image is None else encoder.image(image, SEED),
        video_TCHW=None if video is None else encoder.video(video, SEED),
    )  # fmt: skip
    with torch.no_grad():
        video = vae.decode((latents_TCHW / found.scaling_factor).transpose(0, 1)[None], CHUNKED)[0]
    return (video.transpose(0, 1) / 2 + 0.5).clamp(0, 1)


def noise(what, *step, copies=0, frames=3):
    """The noise that our sampler draws, `[1, T, C, H, W]`, the repeated frames in front included."""
    return draws.normal_frames(range(-copies, frames), (4, 4, 6), SEED, f"sampling {what}", 0, *step)[None]


def give_noise(monkeypatch, copies=0, frames=3):
    """Let the DPM scheduler, which draws for itself, take our noise of its step."""
    original, at = CogVideoXDPMScheduler.step, {"step": -1}

    def step(self, *args, **kwargs):
        at["step"] += 1
        return original(self, *args, **kwargs)

    def draw(*_, **__):
        return noise("step", at["step"], copies=copies, frames=frames)

    monkeypatch.setattr(CogVideoXDPMScheduler, "step", step)
    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", draw)


def give_posterior_noise(monkeypatch, what, frames):
    """Let diffusers' VAE, which samples its posterior, take our draw of it."""
    drawn = noise(what, frames=frames).transpose(1, 2)
    monkeypatch.setattr(diffusers_vae, "randn_tensor", lambda shape, **_: drawn.reshape(shape))


def texts():
    """An embedding that stands for a prompt, and one for none."""
    return draws.normal((TEXT_LENGTH, TEXT_WIDTH), 1, "text"), torch.zeros(TEXT_LENGTH, TEXT_WIDTH)


def pipeline(kind, folder):
    """Load one of diffusers' pipelines from what we exported."""
    pipe = kind.from_pretrained(folder, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_same_picture(actual, expected):
    assert expected.shape[1:] == (3, HEIGHT, WIDTH)
    assert float(expected.std()) > 0.05  # a picture, not one colour
    assert_close(actual, expected, BOUND, "video")


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b"])
def test_pipeline_on_our_export_makes_our_video(tmp_path, monkeypatch, variant, groups):
    ours, theirs = export(tmp_path, variant)
    copies = 1 if variant == "1.5-5b" else 0  # 3 latent frames make 4 with a repeated one
    give_noise(monkeypatch, copies)
    text, null = texts()
    expected = pipeline(CogVideoXPipeline, theirs)(
        prompt_embeds=text[None], negative_prompt_embeds=null[None], latents=noise("start", copies=copies),
        num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        output_type="pt",
    ).frames[0]  # fmt: skip
    assert len(expected) == FRAMES
    check_same_picture(our_video(ours, text, null, groups), expected)


def test_legacy_guidance_is_the_pipelines_dynamic_one(tmp_path, monkeypatch, groups):
    ours, theirs = export(tmp_path, "5b")
    give_noise(monkeypatch)
    text, null = texts()
    expected = pipeline(CogVideoXPipeline, theirs)(
        prompt_embeds=text[None], negative_prompt_embeds=null[None], latents=noise("start"), num_frames=FRAMES,
        height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE, use_dynamic_cfg=True,
        output_type="pt",
    ).frames[0]  # fmt: skip
    check_same_picture(our_video(ours, text, null, groups, guidance="legacy"), expected)


def test_text_encoder_and_empty_prompt_travel(tmp_path, groups):
    """A prompt as text through the exported tokenizer and T5; what stands for no prompt is the empty one, as there."""
    encoder = build_tiny_text_encoder(tmp_path / "t5", [PROMPT, "a cat sleeps on a sofa"], width=TEXT_WIDTH)
    ours, theirs = export(tmp_path, "2b", text_encoder=encoder, unconditional_text="empty")
    embedded, _ = TextEncoder.from_folder(theirs, TEXT_LENGTH).encode([PROMPT, ""])
    pipe = CogVideoXPipeline.from_pretrained(theirs)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT, latents=noise("start"), num_frames=FRAMES, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, max_sequence_length=TEXT_LENGTH, output_type="pt",
    ).frames[0]  # fmt: skip
    for folder in (ours, theirs):  # a converted checkpoint, and the diffusers folder as it lies
        assert_close(our_video(folder, embedded[0], embedded[1], groups), expected, BOUND, "video")


@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-5b-i2v"])
def test_image_to_video_pipeline_makes_our_video(tmp_path, monkeypatch, variant, groups):
    """Learned positions and a scaled image; temporal patches, a motion offset and an image divided by the scale."""
    ours, theirs = export(tmp_path, variant)
    copies = 1 if variant == "1.5-5b-i2v" else 0
    give_noise(monkeypatch, copies)
    give_posterior_noise(monkeypatch, "image posterior", 1)
    pipe = pipeline(CogVideoXImageToVideoPipeline, theirs)
    assert pipe.vae.config.invert_scale_latents == (variant == "1.5-5b-i2v")  # published
    text, null = texts()
    image = draws.normal((3, HEIGHT, WIDTH), 1, "image").clamp(-1, 1)
    expected = pipe(
        image=image[None], prompt_embeds=text[None], negative_prompt_embeds=null[None], num_frames=FRAMES,
        height=HEIGHT, width=WIDTH, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=noise("start", copies=copies), output_type="pt",
    ).frames[0]  # fmt: skip
    assert len(expected) == FRAMES
    check_same_picture(our_video(ours, text, null, groups, image=image), expected)


@pytest.mark.parametrize(
    ("variant", "frames", "strength", "guidance"),
    [("2b", 9, 0.5, "legacy"), ("5b", 9, 0.8, "constant"), ("1.5-5b", 16, 0.5, "constant")],
)
def test_video_to_video_pipeline_makes_our_video(tmp_path, monkeypatch, variant, frames, strength, guidance, groups):
    """The pipeline wants latent frames that the temporal patch divides: 16 frames are 4 latent ones, and come back."""
    ours, theirs = export(tmp_path, variant)
    latent_frames = -(-frames // 4)
    give_noise(monkeypatch, frames=latent_frames)
    give_posterior_noise(monkeypatch, "video posterior", latent_frames)
    start = noise("start", frames=latent_frames)
    monkeypatch.setattr(pipeline_cogvideox_video2video, "randn_tensor", lambda *_, **__: start)
    text, null = texts()
    video = draws.normal((frames, 3, HEIGHT, WIDTH), 1, "video").clamp(-1, 1)
    expected = pipeline(CogVideoXVideoToVideoPipeline, theirs)(
        video=video, prompt_embeds=text[None], negative_prompt_embeds=null[None], height=HEIGHT, width=WIDTH,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, strength=strength, use_dynamic_cfg=guidance == "legacy",
        output_type="pt",
    ).frames[0]  # fmt: skip
    assert len(expected) == frames
    ours = our_video(ours, text, null, groups, guidance=guidance, video=video.transpose(0, 1), strength=strength)
    check_same_picture(ours, expected)
