"""`generate` on two ranks: checkpoints load onto the layout, and one whole model gives the same frames.

What is finished isn't made again; images, videos, and the VAE's work over ranks make no difference to one process.
"""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from megacogvx import draws
from megacogvx.testing.spawn import on_ranks

PROMPTS = ["a red ball rolls", "a blue square turns"]


def _model(groups, **changes):
    from megacogvx.testing.one_process import Setting, make

    return make(groups, Setting("5b", changes={"in_channels": 4, "max_text_seq_length": 16, **changes}))


def _write_checkpoints(groups, folder, **changes):
    """Save a tiny VAE, transformer and text encoder, as training would on this layout."""
    from megacogvx.checkpoint.directory import CheckpointDirectory
    from megacogvx.checkpoint.distributed import save
    from megacogvx.config import dump_config
    from megacogvx.models.vae.config import VAEConfig
    from megacogvx.models.vae.initialize import initialize_weights
    from megacogvx.models.vae.model import CogVideoXVAE
    from megacogvx.parallel.groups import barrier
    from megacogvx.testing.tiny_text_encoder import build_tiny_text_encoder

    if groups.is_first:
        build_tiny_text_encoder(folder / "text", [*PROMPTS, "a green box falls down a hill"], width=24, layers=1)
    barrier(groups)
    vae_config = VAEConfig(preset="tiny", latent_channels=4)
    vae = CogVideoXVAE(vae_config)
    initialize_weights(vae, 1)
    extra = {"config": {"vae": dump_config(vae_config)}}
    save(CheckpointDirectory(folder / "vae" / "checkpoints"), 10, vae, None, extra, groups)
    model = _model(groups, **changes)
    encoder = {
        "text_kind": "real", "text_length": 16, "text_width": 24, "latent_channels": 4, "latent_scale_factor": 0.8,
        "vae_fingerprint": "a", "text_encoder_fingerprint": "b",
    }  # fmt: skip
    extra = {"config": {"model": dump_config(model.config), "diffusion": {"scaling_factor": None}, "encoder": encoder}}
    save(CheckpointDirectory(folder / "run" / "checkpoints"), 20, model, None, extra, groups)
    return model


@on_ranks(2, {"tensor_parallel_size": 2}, {})
def test_generate_writes_every_prompt(groups, folder):
    """Two tensor ranks share each video, or two replicas share the prompts; one rank alone gives the same pixels."""
    from megacogvx.data.transforms import to_pixels
    from megacogvx.data.video import read_frames
    from megacogvx.diffusion.schedule import NoiseSchedule
    from megacogvx.errors import CheckpointError
    from megacogvx.inference import generate as verb
    from megacogvx.inference.denoise import Denoiser
    from megacogvx.inference.load import load_transformer, load_vae
    from megacogvx.inference.work import Work
    from megacogvx.testing.one_process import alone

    saved = _write_checkpoints(groups, folder)
    loaded = load_transformer(folder / "run" / "checkpoints" / "step-00000020", groups, torch.float32)
    for (name, ours), theirs in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert not theirs.requires_grad
    with pytest.raises(CheckpointError, match="holds a vae and no transformer"):
        load_transformer(folder / "vae", groups, torch.float32)
    with pytest.raises(CheckpointError, match="holds a transformer and no vae"):
        load_vae(folder / "run", groups.device, torch.float32)

    plan = _plan(groups, folder, "--steps=2", "--seed=3", f"--out={folder / 'out'}", "--png", "--contact-sheet")
    assert (plan.transformer.settings.scaling_factor, plan.transformer.step, plan.vae.step) == (0.8, 20, 10)
    verb.generate(plan, groups)

    solo = alone(groups)
    works = [Work(job, {"text": job.prompt}) for job in plan.jobs]
    texts = verb.encode_texts(plan, works, groups.device, torch.float32)
    assert len(texts["sample-000"][0]) < 16, "texts are real, not padded"
    denoiser = Denoiser(_model(solo), NoiseSchedule(plan.transformer.settings.diffusion), solo)
    decoder = load_vae(folder / "vae", groups.device, torch.float32)
    for place, (name, (text_LE, null_LE)) in enumerate(texts.items()):
        latents_TCHW = denoiser.sample(text_LE, null_LE, (3, 4, 4, 6), plan.jobs[place].settings, place)
        with torch.no_grad():
            video_CTHW = decoder.decode((latents_TCHW / 0.8).transpose(0, 1)[None])[0]
        stem = folder / "out" / name
        assert read_frames(stem.with_suffix(".mp4")).shape == (9, 32, 48, 3)
        # rounding to 8 bits may fall either way
        assert (_written(stem).float() - to_pixels(video_CTHW).float()).abs().max() <= 1
        facts = json.loads(stem.with_suffix(".json").read_text())
        assert (facts["prompt"], facts["transformer_step"], facts["frames"]) == (PROMPTS[place], 20, 9)
    _check_goes_on(plan, groups, folder / "out")


def _check_goes_on(plan, groups, out):
    """One video was interrupted while its files were written; the other one is finished."""
    from megacogvx.inference import generate as verb
    from megacogvx.parallel.groups import barrier

    assert len(list(out.glob("*.mp4"))) == 2 and not (out / ".latents").exists()
    barrier(groups)
    if groups.is_first:
        (out / "sample-001.json").unlink()
    barrier(groups)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir() if file.is_file()}
    barrier(groups)
    verb.generate(plan, groups)
    after = {file: file.stat().st_mtime_ns for file in out.iterdir() if file.is_file()}
    made = {file.name for file in after if after[file] != before.get(file)}
    assert made == {"sample-001.json", "sample-001.mp4", "sample-001-sheet.png"}, made


@on_ranks(2, {"context_parallel_size": 2})
def test_images_and_videos_do_not_depend_on_the_layout(groups, folder):
    """Ranks encode and decode whole videos of their own, or share each one's frames; one process gives the same."""
    from megacogvx.data.images import write_png
    from megacogvx.data.transforms import to_pixels
    from megacogvx.data.video import write_video
    from megacogvx.diffusion.schedule import NoiseSchedule
    from megacogvx.inference import generate as verb
    from megacogvx.inference.conditions import ConditionEncoder, read_first_frame, read_start
    from megacogvx.inference.denoise import Denoiser
    from megacogvx.inference.load import load_vae
    from megacogvx.inference.work import Work
    from megacogvx.parallel.groups import barrier
    from megacogvx.testing.one_process import alone

    changes = {"in_channels": 8, "patch_size_t": 2}
    _write_checkpoints(groups, folder, **changes)
    if groups.is_first:
        noise = draws.normal((9, 32, 48, 3), 0, "video") * 40 + 120
        write_png(folder / "a.png", noise[0].clamp(0, 255).to(torch.uint8))
        write_video(folder / "a.mp4", noise.clamp(0, 255).to(torch.uint8), 8)
        rows = [{"prompt": PROMPTS[0], "seed": 5}, {"prompt": PROMPTS[1], "video": "a.mp4", "strength": 0.5}]
        (folder / "a.jsonl").write_text("\n".join(json.dumps({**row, "image": "a.png"}) for row in rows))
    barrier(groups)
    common = ("--prompts-file", folder / "a.jsonl", "--steps=4", "--sampler=dpm", "--png")
    plan = _plan(groups, folder, *common, f"--out={folder / 'each'}", prompts=())
    verb.generate(plan, groups)
    verb.generate(_plan(groups, folder, *common, f"--out={folder / 'shared'}", "--vae-over-ranks", prompts=()), groups)

    solo = alone(groups)
    texts = verb.encode_texts(
        plan, [Work(job, {"text": job.prompt}) for job in plan.jobs], groups.device, torch.float32
    )
    denoiser = Denoiser(_model(solo, **changes), NoiseSchedule(plan.transformer.settings.diffusion), solo)
    vae = load_vae(folder / "vae", groups.device, torch.float32)
    encoder = ConditionEncoder(vae, 0.8)
    image = read_first_frame(folder / "a.png", (32, 48))
    for job, seed, start in zip(plan.jobs, (5, 0), (None, folder / "a.mp4"), strict=True):
        draw = (seed, job.place)
        video = None if start is None else encoder.video(read_start(start, (32, 48), 9, 8.0), *draw)
        latents_TCHW = denoiser.sample(
            *texts[job.name], (3, 4, 4, 6), job.settings, job.place, encoder.image(image, *draw), video
        )
        with torch.no_grad():
            expected = to_pixels(vae.decode((latents_TCHW / 0.8).transpose(0, 1)[None])[0]).float()
        for way in ("each", "shared"):
            assert (_written(folder / way / job.name).float() - expected).abs().max() <= 1, (way, job.name)


def _plan(groups, folder, *options, prompts=PROMPTS):
    """Plan a call as the verb does, at 9 frames of 32 x 48 pixels."""
    from megacogvx.inference import generate as verb
    from megacogvx.inference.plan import plan_of
    from megacogvx.parallel.config import ParallelConfig

    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    places = ["--checkpoint", folder / "run", "--vae", folder / "vae", "--text-encoder", folder / "text"]
    sizes = ["--frames=9", "--height=32", "--width=48", *(f"--prompt={prompt}" for prompt in prompts)]
    parallel = ParallelConfig(tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1])
    return plan_of(parser.parse_args([str(word) for word in (*places, *sizes, *options)]), parallel)


def _written(stem):
    from megacogvx.data.video import read_frames

    return torch.stack([read_frames(stem / f"frame-{frame:04d}.png")[0] for frame in range(9)])
