"""Loss of held-out samples at fixed timesteps and with fixed noise: the same question each time it is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from megacogvx.config import Section
from megacogvx.data.corpus import Corpus
from megacogvx.data.loader import PackLoader
from megacogvx.data.pack import Pack
from megacogvx.data.planner import PackPlan
from megacogvx.errors import DataError
from megacogvx.parallel.data_parallel import DistributedDataParallel, ForwardStep, forward_backward, sum_over_tokens
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.pipeline_parallel import from_last_stage
from megacogvx.training.ema import WeightAverage


class ValidationConfig(Section):
    """Section `validation` of pretraining: which samples are held out, and what is asked of them.

    Attributes:
        paths: dataset folders that the training doesn't read; none: there is no validation.
        steps: packs are taken as for so many training steps.
        timesteps: each pack is noised to each of these, 0 (clean) to `diffusion.num_train_timesteps` - 1.
        videos: how many of the held-out texts are made into videos, with the noise of `training.seed`.
        vae: run folder or checkpoint of the VAE that encoded the dataset; the videos need it.
        video_steps: sampling steps.
        guidance_scale: of the videos' classifier-free guidance.
        vae_mode: how much of a video the VAE decodes at once, whole, chunked or tiled; it works on the first rank,
            beside the model and its optimizer.
    """

    paths: tuple[str, ...] = ()
    steps: int = Field(1, ge=1)
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    videos: int = Field(0, ge=0)
    vae: Path | None = None
    video_steps: int = Field(20, ge=1)
    guidance_scale: float = Field(6.0, ge=1)
    vae_mode: Literal["whole", "chunked", "tiled"] = "chunked"

    @field_validator("timesteps")
    @classmethod
    def _some(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 0:
            raise ValueError("name at least one timestep, none below 0")
        return value


def held_out_packs(
    corpus: Corpus,
    plan: PackPlan,
    steps: int,
    groups: ParallelGroups,
    training: Corpus,
    with_images: bool = False,
    vocabulary: int | None = None,
) -> list[Pack]:
    """Read this rank's held-out packs.

    Args:
        corpus, plan: of the held-out datasets.
        steps: see `ValidationConfig`.
        groups: which data rank this is.
        training: the corpus that is trained on.
        with_images: read the first frames' pixels too.
        vocabulary: see `PackLoader`.

    Raises:
        DataError: a held-out sample is trained on as well, or can't be read.
    """
    shared = np.intersect1d(corpus.columns.sample_id, training.columns.sample_id)
    if len(shared):
        raise DataError(
            f"{len(shared)} samples of validation.paths are in data.paths too (the first is {shared[0]}): their loss "
            "would tell nothing; split the dataset, or name another one"
        )
    with PackLoader(corpus, plan, *groups.data, with_images=with_images, vocabulary=vocabulary) as loader:
        packs = [pack for packs in islice(loader, steps) for pack in packs]
    bad = [pack.sample_ids[place] for pack in packs for place in pack.faults]
    if bad:
        raise DataError(
            f"the held-out samples {bad[:8]} can't be read; see `megacogvx data verify`, or filter them out"
        )
    return packs


class ValidationLoss:
    """Measures the loss on held-out packs.

    Args:
        forward_step: the training's, without conditioning dropout.
        packs: this rank's; placed as the model wants them.
        timesteps: to measure at.
        model: the data-parallel wrapper.
        groups: process groups.
        pack_tokens: tokens of each pack.
        read_sums: turns the sums of all ranks into `loss`.
        average: averaged weights, which are measured too if there are any.
    """

    def __init__(
        self, forward_step: ForwardStep, packs: list[Pack], timesteps: tuple[int, ...], model: DistributedDataParallel,
        groups: ParallelGroups, pack_tokens: int, read_sums: Any, average: WeightAverage | None = None,
    ) -> None:  # fmt: skip
        self.forward_step, self.packs, self.timesteps, self.model = forward_step, packs, timesteps, model
        self.groups, self.pack_tokens, self.read_sums, self.average = groups, pack_tokens, read_sums, average

    def measure(self, step: int, alive: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Return {"validation_loss": mean over the timesteps, "validation_loss_by_timestep": one each}.

        With averaged weights also "validation_loss_ema", the mean with those. `alive` is called before each pack.
        """
        losses = [self._loss_at(timestep, alive) for timestep in self.timesteps]
        measured = {"validation_loss": sum(losses) / len(losses), "validation_loss_by_timestep": losses}
        if self.average is not None:
            with self.average.in_use():
                averaged = [self._loss_at(timestep, alive) for timestep in self.timesteps]
            measured["validation_loss_ema"] = sum(averaged) / len(averaged)
        return measured

    def _loss_at(self, timestep: int, alive: Callable[[], object]) -> float:
        def microbatches() -> Iterator[tuple[Pack, list[int]]]:
            for pack in self.packs:
                alive()
                yield pack, [timestep] * (pack.layout.num_samples - 1)

        metrics = forward_backward(
            self.forward_step, microbatches(), self.model, self.groups,
            num_microbatches=len(self.packs), pack_tokens=self.pack_tokens, forward_only=True,
        )  # fmt: skip
        local = torch.stack([metric["sums"] for metric in metrics]).sum(dim=0) if metrics else None
        return float(self.read_sums(sum_over_tokens(from_last_stage(local, self.groups), self.groups))["loss"])
