"""Videos of held-out texts during training: the same texts, sizes and noise each time, so that one sees progress."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from megacogvx.data.pack import Pack
from megacogvx.data.transforms import to_pixels
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.inference.denoise import Denoiser, SamplingSettings
from megacogvx.inference.load import load_vae
from megacogvx.inference.video_file import write_mp4
from megacogvx.models.transformer.model import CogVideoXTransformer
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.training.ema import WeightAverage
from megacogvx.training.text_condition import TextRows

FPS = 8.0


class ValidationVideos:
    """Samples videos of the first held-out samples' texts; the ranks of the first replica do it together.

    Args:
        packs: this data rank's held-out packs.
        count: videos.
        model: the transformer itself, not its data-parallel wrapper.
        schedule: of its training.
        scaling_factor: what the VAE's latents were multiplied by.
        vae: run folder or checkpoint of the VAE that encoded the dataset; loaded each time, for it needs the memory.
        settings: steps, guidance, seed.
        folder: the videos go to FOLDER/step-N-video-M.mp4 too.
        groups: process groups.
        average: averaged weights, which sample if there are any: they are what one would use.
        texts: says what stands for no text; None: zeros.
    """

    def __init__(
        self, packs: list[Pack], count: int, model: CogVideoXTransformer, schedule: NoiseSchedule,
        scaling_factor: float, vae: Path, settings: SamplingSettings, folder: Path, groups: ParallelGroups,
        average: WeightAverage | None = None, texts: TextRows | None = None,
    ) -> None:  # fmt: skip
        samples = [(pack, place) for pack in packs for place in range(pack.layout.num_samples - 1)]
        self.samples = samples[:count] if groups.data[0] == 0 else []
        self.model, self.schedule, self.scaling_factor, self.vae = model, schedule, scaling_factor, vae
        self.settings, self.folder, self.groups = settings, folder, groups
        self.average, self.texts = average, texts

    def make(self, step: int) -> dict[str, torch.Tensor]:
        """Return {name: uint8 frames `[T, H, W, 3]`} on the first rank, nothing on the others; all call it."""
        was_training = self.model.training
        denoiser = Denoiser(self.model, self.schedule, self.groups)  # puts the model into evaluation mode
        with nullcontext() if self.average is None else self.average.in_use():
            latents = [self._sample(denoiser, place) for place in range(len(self.samples))]
        self.model.train(was_training)
        if not self.groups.is_first or not latents:
            return {}
        parameter = next(self.model.parameters())
        decoder = load_vae(self.vae, parameter.device, parameter.dtype)
        videos = {}
        for place, latents_TCHW in enumerate(latents):
            z_BCTHW = (latents_TCHW / self.scaling_factor).transpose(0, 1)[None].to(parameter)
            with torch.no_grad():
                frames_THWC = to_pixels(decoder.decode(z_BCTHW)[0])
            write_mp4(frames_THWC, self.folder / f"step-{step + 1:08d}-video-{place}.mp4", FPS)
            videos[f"video-{place}"] = frames_THWC
        return videos

    def _sample(self, denoiser: Denoiser, place: int) -> torch.Tensor:
        pack, sample = self.samples[place]
        frames, height, width, channels = pack.latents[sample].shape
        text_LE = pack.text[sample].to(next(self.model.parameters()))
        shape = (frames, channels // 2, height, width)
        no_text_LE = torch.zeros_like(text_LE) if self.texts is None else self.texts.dropped(len(text_LE)).to(text_LE)
        return denoiser.sample(text_LE, no_text_LE, shape, self.settings, place)
