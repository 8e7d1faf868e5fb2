"""What `generate` checks before any process group or model exists: the checkpoints here have configs and no weights."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from megacogvx import draws
from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.manifest import files_of, seal
from megacogvx.config import dump_config
from megacogvx.conversion.convert import convert
from megacogvx.data.images import write_png
from megacogvx.data.video import write_video
from megacogvx.errors import CheckpointError, ConfigError, DataError, MegacogvxError
from megacogvx.inference.generate import add_arguments
from megacogvx.inference.options import upsampler_name
from megacogvx.inference.plan import plan_of
from megacogvx.inference.video_size import VideoSize
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig
from megacogvx.parallel.config import ParallelConfig
from megacogvx.testing.drawn_checkpoint import FRAMES, HEIGHT, TEXT_WIDTH, WIDTH, tiny_parts
from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder


def write(run, sections):
    directory = CheckpointDirectory(run / "checkpoints")
    partial = directory.begin(20)
    (partial / "state.json").write_text(json.dumps({"config": sections}))
    directory.commit(20, {name: seal(partial, name) for name in files_of(partial)})


@pytest.fixture
def plan(tmp_path):
    """Write a transformer's, a VAE's and a text encoder's configs, and plan a call with these options."""

    def make(*options, model=None, latent_channels=4, text_width=24, ranks=1, conventions=None):
        sizes = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 24, "sample_height": 8, "sample_width": 12,
                 "sample_frames": 17}  # fmt: skip
        encoder = {"text_kind": "padded", "text_length": 16, "text_width": 24, "latent_channels": 4,
                   "latent_scale_factor": 0.6, "vae_fingerprint": "a", "text_encoder_fingerprint": "b"}  # fmt: skip
        model = CogVideoXConfig(preset="tiny", **{**sizes, **(model or {})})
        sections = {"model": dump_config(model), "diffusion": {}, "encoder": encoder, "conventions": conventions or {}}
        write(tmp_path / "run", sections)
        write(tmp_path / "vae", {"vae": dump_config(VAEConfig(preset="tiny", latent_channels=latent_channels))})
        text = tmp_path / "text"
        text.mkdir(exist_ok=True)
        (text / "config.json").write_text(json.dumps({"d_model": text_width}))
        (text / "spiece.model").write_bytes(b"")
        save_file({}, text / "model.safetensors")
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        places = ["--checkpoint", tmp_path / "run", "--vae", tmp_path / "vae", "--text-encoder", text]
        arguments = parser.parse_args([str(word) for word in (*places, *options)])
        return plan_of(arguments, ParallelConfig(tensor_parallel_size=ranks), upsampler_name(arguments))

    return make


PROMPT = ("--prompt", "a dog")
I2V = {"in_channels": 8}


def picture(tmp_path):
    write_png(tmp_path / "dog.png", torch.full((64, 96, 3), 90, dtype=torch.uint8))
    return tmp_path / "dog.png"


def clip(tmp_path, frames=24):
    video = (draws.normal((frames, 64, 96, 3), 0, "video") * 40 + 120).clamp(0, 255).to(torch.uint8)
    write_video(tmp_path / "dog.mp4", video, 8)
    return tmp_path / "dog.mp4"


def test_options_become_a_plan(plan):
    made = plan(
        *PROMPT, "--steps", 25, "--sampler", "dpm", "--guidance", "legacy", "--guidance-scale", 4, "--seed", 7,
        "--strength", 0.5, "--contact-sheet",
    )  # fmt: skip
    (job,) = made.jobs
    settings = job.settings
    assert (settings.num_steps, settings.sampler, settings.guidance) == (25, "dpm", "legacy")
    assert (settings.guidance_scale, settings.seed, settings.strength) == (4.0, 7, 0.5)
    assert (made.fps, made.contact_sheet, made.png, made.upsampler) == (8.0, True, False, None)
    assert (made.size, made.latent_shape) == (VideoSize(17, 64, 96), (5, 4, 8, 12))
    assert made.steps_of(job) == 25


def test_what_the_weights_expect_is_the_default(plan):
    (job,) = plan(*PROMPT, conventions={"sampler": "dpm", "repeated_frames": "predicted"}).jobs
    assert (job.settings.sampler, job.settings.repeated_frames) == ("dpm", "predicted")
    (job,) = plan(*PROMPT, "--sampler", "ddim", conventions={"sampler": "dpm"}).jobs
    assert (job.settings.sampler, job.settings.repeated_frames) == ("ddim", "copied")
    assert plan(*PROMPT).jobs[0].settings.sampler == "ddim"


def test_steps_of_a_video_are_those_that_its_strength_leaves(plan, tmp_path):
    made = plan(*PROMPT, "--video", clip(tmp_path), "--steps", 10, "--strength", 0.55)
    assert (made.steps_of(made.jobs[0]), made.starts_from_video(made.jobs[0])) == (5, True)
    model = ("--upsampler-url", "http://localhost:1/v1", "--upsampler-model", "seer")
    made = plan("--video", clip(tmp_path), "--video-as", "caption", "--steps", 10, *model)
    (job,) = made.jobs
    assert (made.steps_of(job), made.starts_from_video(job), made.describes_video(job)) == (10, False, True)
    assert made.upsampler == "seer at http://localhost:1"


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ((), {}, "there is no prompt"),
        (("--frames", 16), {}, r"--frames 16 must be 8k \+ 1"),
        (("--fps", 0), {}, r"--fps 0.0 must be positive"),
        (("--steps", 1001), {}, r"1001 sampling steps don't fit diffusion.num_train_timesteps=1000"),
        (("--fps", "inf"), {}, r"--fps inf must be positive"),
        (("--image-noise", -1), {}, "--image-noise -1.0 must not be negative"),
        (("--image-noise", "nan"), {}, "--image-noise nan must not be negative"),
        (("--guidance-scale", "nan"), {}, "a guidance scale of nan is no number"),
        (("--seed", 2**64), {}, "the seed 18446744073709551616 must lie in 0"),
        (("--output", "/dev/null/samples"), {}, "--output /dev/null/samples: /dev/null is no folder; name another"),
        (("--height", 80), {}, r"--frames 17 --height 80 --width 96: 5 x 6 tokens \(h, w\) are more than the rope"),
        (("--height", 32), {"model": {**I2V, "use_learned_positional_embeddings": True}},
         r"\(5, 2, 6\) tokens \(t, h, w\), but the learned position table of this model is made for at most 5 x 4 x 6"),
        ((), {"latent_channels": 8}, r"latent_channels=8, the transformer .* makes model.out_channels=4"),
        ((), {"model": {"in_channels": 6}}, r"model.in_channels=6 for model.out_channels=4 .* or twice as many"),
        ((), {"text_width": 32}, r"has width 32, the model was trained with model.text_embed_dim=24"),
        ((), {"model": I2V}, r"sample-000: the transformer .* makes videos of images; give --image FILE"),
        (("--vae-over-ranks",), {"ranks": 6}, "--vae-over-ranks: 17 frames cannot be split over 6 ranks"),
        (("--vae-over-ranks", "--vae-mode", "chunked"), {"ranks": 2}, "chunks of 2 latent frames exclude each other"),
        (("--vae-mode", "chunked", "--vae-chunk", 3), {}, "latents_per_chunk=3 doesn't fit"),
        (("--upsampler-url", "http://localhost:1"), {}, "--upsampler-model NAME"),
        (("--upsampler-url", "localhost", "--upsampler-model", "a"), {}, "must be an address such as"),
        (("--upsampler-url", "http://a", "--upsampler-folder", "b"), {}, "name two language models"),
        (("--upsampler-folder", "nowhere"), {}, "nowhere has no config.json; a local language model is a folder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_any_model_is_loaded(plan, options, changes, message):
    prompt = () if message == "there is no prompt" else PROMPT
    with pytest.raises(MegacogvxError, match=message):
        plan(*prompt, *options, **changes)


def test_an_image_needs_a_model_that_reads_it(plan, tmp_path):
    assert plan(*PROMPT, "--image", picture(tmp_path), model=I2V).transformer.settings.expects_image
    with pytest.raises(ConfigError, match=r"sample-000 has the image .*dog.png, but the transformer .* reads none"):
        plan(*PROMPT, "--image", picture(tmp_path))


def test_videos_have_to_be_long_enough_and_leave_steps(plan, tmp_path):
    with pytest.raises(DataError, match=r"lasts 1.50 s, which is 12.0 frames at --fps 8, .* --frames 9 works"):
        plan(*PROMPT, "--video", clip(tmp_path, 12))
    for strength in (0.0, 0.04, 1.5):
        with pytest.raises(ConfigError, match=r"leaves no step of 20 to a video: it takes .* 1 / steps = 0.05"):
            plan(*PROMPT, "--video", clip(tmp_path), "--steps", 20, "--strength", strength)
    with pytest.raises(ConfigError, match="--video-as caption needs a vision model"):
        plan("--video", clip(tmp_path), "--video-as", "caption")
    with pytest.raises(ConfigError, match="sample-000 has no prompt"):
        plan("--video", clip(tmp_path))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DataError, match=r"text.mp4 can't be decoded"):
        plan(*PROMPT, "--video", tmp_path / "text.mp4")


def test_unreadable_images_are_named_before_any_model_is_loaded(plan, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text.png can't be read"):
        plan(*PROMPT, "--image", tmp_path / "text.png", model=I2V)


def test_requests_of_a_file_are_checked_each(plan, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a dog"}\n{"prompt": "a cat", "steps": 2000}\n')
    with pytest.raises(ConfigError, match="2000 sampling steps"):
        plan("--prompts-file", tmp_path / "a.jsonl")


def planned(*options):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return plan_of(parser.parse_args([str(word) for word in (*PROMPT, *options)]), ParallelConfig())


def test_a_folder_of_another_format_is_enough(tmp_path):
    """A pipeline's folder holds everything; what isn't there is asked for, and may come from another format."""
    text = build_tiny_text_encoder(tmp_path / "t5", ["a dog runs"], width=TEXT_WIDTH)
    parts = tiny_parts("1.5-5b")
    whole = convert(parts, "diffusers", tmp_path / "whole", text_encoder=text, check=False)
    sat = convert({"transformer": parts["transformer"]}, "sat", tmp_path / "sat", check=False)
    made = planned("--checkpoint", whole)
    assert (made.transformer.path, made.vae.path, made.text_encoder) == (whole / "transformer", whole / "vae", whole)
    assert made.transformer.settings == parts["transformer"].settings
    assert (made.transformer.step, made.jobs[0].settings.sampler) == (None, "dpm")
    assert (made.size, made.latent_shape) == (VideoSize(FRAMES, HEIGHT, WIDTH), (3, 4, 4, 6))
    with pytest.raises(ConfigError, match=r"--checkpoint .*sat holds no VAE; name the one that goes with it: --vae"):
        planned("--checkpoint", sat)
    with pytest.raises(ConfigError, match=r"sat holds no tokenizer/ and text_encoder/; .*--text-encoder"):
        planned("--checkpoint", sat, "--vae", whole)
    mixed = planned("--checkpoint", sat, "--vae", whole, "--text-encoder", whole)
    assert mixed.transformer.settings == made.transformer.settings and mixed.vae.config == made.vae.config
    with pytest.raises(ConfigError, match=r"--weights ema: a diffusers folder .* holds one set of weights"):
        planned("--checkpoint", whole, "--weights", "ema")
    with pytest.raises(CheckpointError, match="vae holds a vae and no transformer; name one that does"):
        planned("--checkpoint", whole / "vae")
    (file,) = (whole / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"vae.*safetensors .* is cut short"):
        planned("--checkpoint", whole)
