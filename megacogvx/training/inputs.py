"""What the steps of a run take: the loader's packs or clips, with what all ranks agreed on of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megacogvx.data.clip_loader import ClipLoader
from megacogvx.data.faults import FaultCounter
from megacogvx.data.loader import PackLoader
from megacogvx.data.pack import Pack
from megacogvx.diffusion.objective import sample_weights
from megacogvx.diffusion.timesteps import step_timesteps
from megacogvx.models.transformer.flops import training_flops
from megacogvx.models.transformer.rope import place_on_rope_grid
from megacogvx.pack_layout import PackLayout
from megacogvx.parallel.data_parallel import max_over_ranks
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.training.agreement import read_together
from megacogvx.training.config import TrainConfig
from megacogvx.training.loop import StepInput
from megacogvx.training.vae_config import VAETrainConfig


def pack_inputs(
    loader: PackLoader, config: TrainConfig, groups: ParallelGroups, bad_samples: Mapping[str, Any]
) -> Iterator[StepInput]:
    """Yield the packs of this rank with the timesteps of their samples, step after step."""
    sizes = f"tp{groups.tensor[1]} cp{groups.context[1]} pp{groups.pipeline[1]} dp{groups.data[1]}"
    counter = FaultCounter(config.data.max_bad_in_a_row, bad_samples)
    for packs, seconds in read_together(loader, groups):
        weights = [sample_weights(layout, config.diffusion.loss_mean) for layout in loader.layouts]
        timesteps = step_timesteps(config.diffusion, config.training.seed, packs[0].step, weights)
        bad = agree_on_faults(packs, loader.layouts, groups, counter)
        facts = {**step_facts(config, loader.layouts), "layout": sizes, "bad_samples": dict(counter.counts)}
        packs = [pack.without(bad[pack.place]) for pack in packs]
        placed = [replace(pack, layout=place_on_rope_grid(pack.layout, config.model)) for pack in packs]
        ids = [[sample.sample_id for sample in pack.layout.samples[:-1]] for pack in packs]
        microbatches = [(pack, timesteps[pack.place]) for pack in placed]
        yield StepInput(microbatches, facts, loader.state(), ids, counter.state(), seconds)


def agree_on_faults(
    packs: list[Pack], layouts: list[PackLayout], groups: ParallelGroups, counter: FaultCounter
) -> list[set[int]]:
    """Return the places of the bad samples in each pack of the step, equal on all ranks.

    Each rank read other frames of a pack, so what one of them couldn't read is bad for all.

    Raises:
        AgreedError: too many samples in a row are bad.
    """
    starts = np.cumsum([0, *(layout.num_samples - 1 for layout in layouts)]).tolist()
    faults = torch.zeros(starts[-1], dtype=torch.int32)
    for pack in packs:
        for place, fault in pack.faults.items():
            faults[starts[pack.place] + place] = int(fault)
    agreed = max_over_ranks(faults, groups).tolist()
    counter.add(agreed, [sample.sample_id for layout in layouts for sample in layout.samples[:-1]])
    return [{m for m in range(end - start) if agreed[start + m]} for start, end in pairwise(starts)]


def step_facts(config: TrainConfig, layouts: list[PackLayout]) -> dict[str, float]:
    """Return what the packs of one step are, for the log.

    `pack_fill` is the share of the token budget that samples use; `balance` the costliest pack's FLOPs over the mean
    (1 is perfect).
    """
    tokens = sum(layout.used_tokens for layout in layouts)
    flops = [training_flops(config.model, layout) for layout in layouts]
    return {
        "samples": sum(layout.num_samples - 1 for layout in layouts),
        "tokens": tokens,
        "pack_fill": round(tokens / sum(layout.num_tokens for layout in layouts), 5),
        "balance": round(max(flops) * len(flops) / sum(flops), 5),
        "flops": sum(flops),
    }


def clip_inputs(loader: ClipLoader, config: VAETrainConfig, groups: ParallelGroups) -> Iterator[StepInput]:
    """Yield the clips of this rank, step after step."""
    state = loader.state()
    for batch, seconds in read_together(loader, groups):
        facts = {"samples": config.clips.clips_per_step, "frames": batch.video_BCTHW.shape[2]}
        yield StepInput([batch], facts, state, data_seconds=seconds)
