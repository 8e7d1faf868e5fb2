"""Held-out clips of a VAE run: PSNR of their reconstructions, and pictures of them beside the originals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from megacogvx.data.clip_loader import ClipLoader
from megacogvx.data.images import write_png
from megacogvx.data.transforms import to_pixels
from megacogvx.evaluation.reconstruction import psnr
from megacogvx.log import get_logger
from megacogvx.models.vae import gaussian
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.parallel.data_parallel import sum_over_data_and_context
from megacogvx.parallel.frame_parallel import gather_frames, shard_pixels
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.training.ema import WeightAverage

logger = get_logger(__name__)

MOST_CLIPS = 8  # measured at a time; the first of the list
MOST_PICTURES = 3
SHOWN_FRAMES = 5


class HeldOutClips:
    """Measures a VAE on clips that it isn't trained on; the data ranks share the clips, the context ranks their frames.

    Args:
        loader: knows which clips are held out.
        model: the VAE itself, not its data-parallel wrapper.
        run_folder: pictures go to RUN/reconstructions.
        groups: process groups.
        average: averaged weights, which are measured too if there are any.
    """

    def __init__(
        self,
        loader: ClipLoader,
        model: CogVideoXVAE,
        run_folder: Path,
        groups: ParallelGroups,
        average: WeightAverage | None = None,
    ):
        self.model, self.groups, self.folder, self.average = model, groups, run_folder / "reconstructions", average
        every = [video for _, video in islice(loader.held_out_videos(), MOST_CLIPS)]
        self.count = len(every)
        if not every:
            logger.info("no clip is held out that is as large as clips.held_out_height x held_out_width: no PSNR")
        self.shown = [place for place, video in enumerate(every) if video.shape[2] > 1][:MOST_PICTURES]
        self.videos = [(place, video) for place, video in enumerate(every) if place % groups.data[1] == groups.data[0]]

    def measure(self, step: int, alive: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Return {"psnr": mean over the held-out clips, in dB}, and "psnr_ema" with the averaged weights.

        The posterior's mean is decoded, without noise. `alive` is called before each clip. Without clips: {}.
        """
        if not self.count:
            return {}
        measured = {"psnr": self._psnr(alive, draw=True)}
        if self.average is not None:
            with self.average.in_use():
                measured["psnr_ema"] = self._psnr(alive, draw=False)
        return measured

    @torch.no_grad()
    def _psnr(self, alive: Callable[[], object], draw: bool) -> float:
        total = torch.zeros(2, dtype=torch.float64)
        parameter = next(self.model.parameters())
        for place, video in self.videos:
            alive()
            reconstruction = self.reconstruct(video.to(parameter)).float().clamp(-1, 1).cpu()
            if self.groups.context[0] != 0:
                continue  # the first context rank has gathered the whole clip
            total += torch.tensor([float(psnr(video, reconstruction).mean()), 1.0], dtype=torch.float64)
            if draw and place in self.shown:
                self._draw(place, video[0], reconstruction[0])
        value, count = sum_over_data_and_context(total, self.groups).tolist()
        return value / count

    def reconstruct(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """Encode and decode a whole clip together with the context ranks; each of them gets all frames back."""
        group, config = self.groups.context_group, self.model.config
        if group.size() == 1 or video_BCTHW.shape[2] == 1:
            return self.model.decode(gaussian.mode(self.model.encode(video_BCTHW)))
        shard = shard_pixels(video_BCTHW.shape[2], config.temporal_compression_ratio, group)
        moments = self.model.encode(shard.cut(video_BCTHW), shard=shard)
        latent_shard = shard.halved(config.temporal_levels)
        return gather_frames(self.model.decode(gaussian.mode(moments), shard=latent_shard), group)

    def _draw(self, place: int, video_CTHW: torch.Tensor, reconstruction_CTHW: torch.Tensor) -> None:
        """Write a few frames of the original above those of its reconstruction, over the picture of before."""
        frames = torch.linspace(0, video_CTHW.shape[1] - 1, min(SHOWN_FRAMES, video_CTHW.shape[1])).round().long()
        rows = [torch.cat(list(part[:, frames].unbind(1)), dim=2) for part in (video_CTHW, reconstruction_CTHW)]
        picture_CTHW = torch.cat(rows, dim=1)[:, None]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_png(self.folder / f"clip{place}.png", to_pixels(picture_CTHW)[0])
