"""`train-vae` as a whole program, with a discriminator and averaged weights, on clips whose frames lie on ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megacogvx.errors import DataError
from megacogvx.testing.spawn import on_ranks

GAN_START, STEPS = 2, 5
CONSTANT = {"learning_rate": 2e-3, "warmup_steps": 0, "decay": "constant"}
SETTINGS: dict[str, Any] = {
    "vae": {"preset": "tiny", "block_out_channels": [4, 4, 8, 8], "norm_num_groups": 2, "latent_channels": 4},
    "clips": {"frames": 17, "height": 32, "width": 32, "clips_per_step": 2, "image_share": 0.34, "prefetch": 0},
    "loss": {"gan_weight": 0.5, "gan_start_step": GAN_START, "perceptual": "none"},
    "discriminator": {"channels": 4, "layers": 2, "norm_num_groups": 2},
    "optimizer": CONSTANT,
    "discriminator_optimizer": CONSTANT,
    "ema": {"decay": 0.9},
    "training": {"steps": STEPS, "validate_every": 100, "save_every": 100},
}


def write_shape_clips(folder: Path, count: int = 6) -> None:
    from megacogvx.data.clips import write_clips
    from megacogvx.testing.moving_shapes import write_shape_clip

    write_clips(folder / "clips.jsonl", [write_shape_clip(folder, number, 17, 32, 32) for number in range(count)])


def train_vae(folder: Path, name: str, **changes: dict[str, Any]) -> Path:
    """Do what the verb does in each process, with the sections of `changes` on top of `SETTINGS`."""
    from megacogvx.config import build_config
    from megacogvx.parallel.groups import shutdown
    from megacogvx.training.loop import train
    from megacogvx.training.setup import build_vae_run
    from megacogvx.training.vae_config import VAETrainConfig

    shutdown(stay_connected=True)
    values = {section: {**SETTINGS.get(section, {}), **changes.get(section, {})} for section in SETTINGS | changes}
    values["clips"]["paths"], values["training"]["run_folder"] = [str(folder)], str(folder / name)
    train(build_vae_run(build_config(VAETrainConfig, values)))
    dist.barrier()
    return folder / name


def rows_of(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what differs from one start to the next."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    of_machine = ("second", "data_wait", "memory")
    return [{key: row[key] for key in row if not any(word in key for word in of_machine)} for row in rows]


def tensors_of(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its name in the file."""
    reader = dcp.FileSystemReader(run_folder / "checkpoints" / f"step-{step:08d}")
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@on_ranks(2, {"context_parallel_size": 2})
def test_a_run_stopped_in_the_middle_of_the_gan_phase_resumes_bit_for_bit(groups, folder):
    if groups.is_first:
        write_shape_clips(folder)
    dist.barrier()
    parallel = {"context_parallel_size": 2}
    straight = train_vae(folder, "straight", parallel=parallel)
    train_vae(folder, "stopped", parallel=parallel, training={**SETTINGS["training"], "steps": GAN_START + 1})
    stopped = train_vae(folder, "stopped", parallel=parallel)
    expected, actual = tensors_of(straight, STEPS), tensors_of(stopped, STEPS)
    assert expected.keys() == actual.keys()
    models = ("model.", "discriminator.")
    parts = (*models, "ema.", *(f"optimizer.state.exp_avg.{model}" for model in models))
    for part in parts:
        assert any(name.startswith(part) for name in expected), f"{part}* is not kept; there is {sorted(expected)[:9]}"
    differing = [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])]
    assert not differing, f"{len(differing)} of {len(expected)} tensors differ: {differing[:5]}"
    ours, theirs = rows_of(stopped), rows_of(straight)
    assert [row for row in ours if "psnr" not in row] == [row for row in theirs if row["step"] in (0, 1, 3)]
    assert ours[-1] == theirs[-1] and {"psnr", "psnr_ema"} <= ours[-1].keys()
    assert ["discriminator" in row for row in ours] == [step >= GAN_START for step in range(STEPS)]
    assert any(
        not torch.equal(expected[name], expected[name.replace("model.", "ema.", 1)])
        for name in expected
        if name.startswith("model.")
    )
    with pytest.raises(DataError, match=r"image_share=0\.34, this start has 0\.5: clips would repeat"):
        train_vae(folder, "stopped", parallel=parallel, clips={"image_share": 0.5})


@on_ranks(4, {"context_parallel_size": 4})
def test_stage_two_on_four_ranks_equals_other_layouts_and_starts_where_stage_one_ended(groups, folder):
    if groups.is_first:
        write_shape_clips(folder)
    dist.barrier()
    first = train_vae(folder, "stage1", clips={"frames": 9, "clips_per_step": 4}, parallel={})
    start = {**SETTINGS["training"], "start_from": str(first)}
    rates = {key: {**CONSTANT, "learning_rate": 1e-30} for key in ("optimizer", "discriminator_optimizer")}
    loss, parallel = {"gan_start_step": 0}, {"context_parallel_size": 4}
    still = train_vae(folder, "still", parallel=parallel, training={**start, "steps": 1}, loss=loss, **rates)
    before, after = tensors_of(first, STEPS), tensors_of(still, 1)
    for name, tensor in before.items():
        if name.startswith(("model.", "discriminator.")):
            assert torch.equal(tensor, after[name]), f"{name} is not stage 1's"
    # Adam's first steps go by the sign of the gradient, be it rounding; large ones set a GAN off on other ways.
    slow = {"discriminator_optimizer": {**CONSTANT, "learning_rate": 1e-4}}
    runs = [
        train_vae(
            folder, f"stage2-cp{size}", parallel={"context_parallel_size": size}, training=start, loss=loss, **slow
        )
        for size in (4, 2)
    ]
    split, other = (rows_of(run) for run in runs)
    for ours, theirs in zip(split, other, strict=True):
        for name in ("loss", "l1", "kl", "gan", "gan_scale", "discriminator", "logits_real", "logits_fake"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-5), (ours["step"], name)
    assert "perceptual_random_net" not in split[0]


@on_ranks(2, {"context_parallel_size": 2})
def test_lengths_that_cannot_be_trained_on_are_refused_before_anything_starts(groups, folder):
    if groups.is_first:
        write_shape_clips(folder, 1)
    dist.barrier()
    with pytest.raises(DataError, match=r"13 frames .*8k \+ 1 frames; the nearest that work: 9, 17"):
        train_vae(folder, "refused", clips={"frames": 13, "clips_per_step": 2}, parallel={})
    assert not (folder / "refused").exists()
