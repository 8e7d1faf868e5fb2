"""Videos of held-out texts during training: the same texts, sizes and noise each time, so that one sees progress.

Image to video starts from the held-out samples' own first frames. Only one replica samples, and only its first rank
decodes; the others meet it after each sampling step, so that none waits in one collective for a whole video.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from megacogvx.data.pack import Pack
from megacogvx.data.transforms import to_model_range, to_pixels
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.inference.conditions import ConditionEncoder
from megacogvx.inference.denoise import Denoiser, SamplingSettings
from megacogvx.inference.load import load_vae
from megacogvx.inference.video_file import write_mp4
from megacogvx.models.transformer.model import CogVideoXTransformer
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.vae.tiling import CHUNKED, Coding
from megacogvx.parallel.groups import ParallelGroups, barrier, broadcast_json
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
        images: encodes first frames, without the noise of training; None: text to video.
        coding: how much of a video the VAE decodes at once.
    """

    def __init__(
        self, packs: list[Pack], count: int, model: CogVideoXTransformer, schedule: NoiseSchedule,
        scaling_factor: float, vae: Path, settings: SamplingSettings, folder: Path, groups: ParallelGroups,
        average: WeightAverage | None = None, texts: TextRows | None = None, images: ConditionEncoder | None = None,
        coding: Coding = CHUNKED,
    ) -> None:  # fmt: skip
        samples = [(pack, place) for pack in packs for place in range(pack.layout.num_samples - 1)]
        self.samples = samples[:count] if groups.data[0] == 0 else []
        self.model, self.schedule, self.scaling_factor, self.vae = model, schedule, scaling_factor, vae
        self.settings, self.folder, self.groups = settings, folder, groups
        self.average, self.texts, self.images, self.coding = average, texts, images, coding

    def make(self, step: int, alive: Callable[[], object] = lambda: None) -> dict[str, torch.Tensor]:
        """Return {name: uint8 frames `[T, H, W, 3]`} on the first rank, nothing on the others; all call it.

        Args:
            step: of the training, for the files' names.
            alive: called on every rank after each sampling step and each decoded video.
        """

        def meet() -> None:
            barrier(self.groups)
            alive()

        count = broadcast_json(len(self.samples), self.groups)  # the first rank is one of those that sample
        was_training = self.model.training
        denoiser = Denoiser(self.model, self.schedule, self.groups)  # puts the model into evaluation mode
        with nullcontext() if self.average is None else self.average.in_use():
            latents = [self._sample(denoiser, place, meet) for place in range(len(self.samples))]
            for _ in range(0 if self.samples else count * self.settings.num_steps):
                meet()
        self.model.train(was_training)
        videos = {}
        decoder = self._decoder() if self.groups.is_first and count else None
        for place in range(count):
            if decoder is not None:
                videos[f"video-{place}"] = self._decoded(decoder, latents[place])
                file = self.folder / f"step-{step + 1:08d}-video-{place}.mp4"
                write_mp4(videos[f"video-{place}"], file, FPS)
            meet()
        return videos

    def _sample(self, denoiser: Denoiser, place: int, meet: Callable[[], None]) -> torch.Tensor:
        pack, sample = self.samples[place]
        frames, height, width, channels = pack.latents[sample].shape
        text_LE = pack.text[sample].to(next(self.model.parameters()))
        shape = (frames, channels // 2, height, width)
        no_text_LE = torch.zeros_like(text_LE) if self.texts is None else self.texts.dropped(len(text_LE)).to(text_LE)
        image_CHW = self._image(pack, sample, place)
        return denoiser.sample(text_LE, no_text_LE, shape, self.settings, place, image_CHW, on_step=meet)

    def _image(self, pack: Pack, sample: int, place: int) -> torch.Tensor | None:
        """Return the scaled latents `[C, h, w]` of a sample's first frame; all ranks of the replica make the same."""
        if self.images is None:
            return None
        pixels_HW3 = pack.images[sample]
        assert pixels_HW3 is not None, f"held-out sample {pack.sample_ids[sample]} was read without its first frame"
        device = next(self.images.vae.parameters()).device
        return self.images.image(to_model_range(pixels_HW3[None])[:, 0].to(device), self.settings.seed, place)

    def _decoder(self) -> CogVideoXVAE:
        parameter = next(self.model.parameters())
        return load_vae(self.vae, parameter.device, parameter.dtype)

    @torch.no_grad()
    def _decoded(self, decoder: CogVideoXVAE, latents_TCHW: torch.Tensor) -> torch.Tensor:
        z_BCTHW = (latents_TCHW / self.scaling_factor).transpose(0, 1)[None].to(next(decoder.parameters()))
        return to_pixels(decoder.decode(z_BCTHW, self.coding)[0])
