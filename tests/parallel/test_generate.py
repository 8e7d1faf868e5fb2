"""`generate` on two ranks: checkpoints load onto the layout, and one whole model gives the same frames."""

from __future__ import annotations

import argparse
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megacogvx import draws
from megacogvx.testing.spawn import on_ranks

SMALL = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    "max_text_seq_length": 16, "in_channels": 4, "out_channels": 4, "use_rotary_positional_embeddings": True,
}  # fmt: skip
PROMPTS = ["a red ball rolls", "a blue square turns"]


def _alone(groups):
    solos = [dist.new_group([rank]) for rank in range(groups.world_size)]
    solo = solos[groups.rank]
    collection = SimpleNamespace(tp=solo, cp=solo, dp=solo, dp_cp=solo, tp_dp_cp=solo)
    return dataclasses.replace(
        groups, collection=collection, tensor=(0, 1), context=(0, 1), data=(0, 1), rank=0, world_size=1
    )


def _model(groups, **changes):
    from megacogvx.models.transformer.config import CogVideoXConfig
    from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.parallel.tensor_parallel import full_shape, shard_of

    config = CogVideoXConfig(**SMALL, **changes)
    parallel = ParallelConfig(tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1])
    model = CogVideoXTransformer(config, transformer_core(config, parallel, groups, torch.float32), groups)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            shape = full_shape(tensor, groups)
            scale = 0.3 if len(shape) == 1 else shape[1] ** -0.5
            full = draws.normal(shape, 0, name) * scale + float("norm" in name and name.endswith("weight"))
            tensor.copy_(shard_of(full, tensor, groups))
    return model.to(groups.device)


def _write_checkpoints(groups, folder):
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
    model = _model(groups)
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
    from megacogvx.inference.load import TransformerCheckpoint, VAECheckpoint, load_transformer, load_vae
    from megacogvx.parallel.groups import barrier

    saved = _write_checkpoints(groups, folder)
    loaded = load_transformer(folder / "run" / "checkpoints" / "step-00000020", groups, torch.float32)
    for (name, ours), theirs in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert not theirs.requires_grad
    with pytest.raises(CheckpointError, match=r"no section 'model' \(it has vae\)"):
        load_transformer(folder / "vae", groups, torch.float32)
    with pytest.raises(CheckpointError, match="no section 'vae'"):
        load_vae(folder / "run", groups.device, torch.float32)

    options = argparse.ArgumentParser()
    verb.add_arguments(options)
    places = ["--checkpoint", folder / "run", "--vae", folder / "vae", "--text-encoder", folder / "text"]
    arguments = options.parse_args([*map(str, places), "--steps=2", "--seed=3", f"--out={folder / 'out'}", "--png"])
    transformer, vae = TransformerCheckpoint.find(arguments.checkpoint), VAECheckpoint.find(arguments.vae)
    assert (transformer.scaling_factor, transformer.step, vae.step) == (0.8, 20, 10)
    size, settings = verb.VideoSize(9, 32, 48), verb.sampling_settings(arguments)
    verb.generate(PROMPTS, size, settings, transformer, vae, arguments, groups)
    barrier(groups)

    alone = _alone(groups)
    texts = verb.encode_prompts(PROMPTS, arguments, transformer, groups.device, torch.float32)
    assert len(texts[0][0]) < 16, "texts are real, not padded"
    denoiser = Denoiser(_model(alone), NoiseSchedule(transformer.diffusion), alone)
    decoder = load_vae(folder / "vae", groups.device, torch.float32)
    for place, (text_LE, null_LE) in enumerate(texts):
        latents_TCHW = denoiser.sample(text_LE, null_LE, (3, 4, 4, 6), settings, place)
        with torch.no_grad():
            video_CTHW = decoder.decode((latents_TCHW / 0.8).transpose(0, 1)[None])[0]
        stem = folder / "out" / f"sample-{place:03d}"
        assert read_frames(stem.with_suffix(".mp4")).shape == (9, 32, 48, 3)
        written = torch.stack([read_frames(stem / f"frame-{frame:04d}.png")[0] for frame in range(9)])
        # rounding to 8 bits may fall either way
        assert (written.float() - to_pixels(video_CTHW).float()).abs().max() <= 1
        facts = json.loads(stem.with_suffix(".json").read_text())
        assert (facts["prompt"], facts["transformer_step"], facts["frames"]) == (PROMPTS[place], 20, 9)
    assert len(list((folder / "out").glob("*.mp4"))) == 2
