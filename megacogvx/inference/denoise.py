"""From noise to latents: the sampling loop with classifier-free guidance, on any layout of tensor and context ranks.

The branches without and with text are two samples of one pack, so one forward serves both and nothing attends from one
to the other. Every rank of a replica keeps the whole (small) latents and cuts its rows out of them; the predicted rows
are gathered again after each forward. Noise is drawn by latent frame, so it doesn't depend on the layout.

Image to video puts the image's latents into the extra channels; video to video starts from the noised latents of a
video (SDEdit, Meng et al., arXiv 2108.01073), as diffusers' CogVideoXVideoToVideoPipeline does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megacogvx import draws
from megacogvx.diffusion.guidance import GuidanceSchedule, combine, guidance_scale
from megacogvx.diffusion.image_condition import image_channels
from megacogvx.diffusion.samplers import ddim_step, ddim_timesteps, dpm_step
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.errors import ConfigError
from megacogvx.log import progress
from megacogvx.models.transformer.model import CogVideoXTransformer
from megacogvx.models.transformer.rope import place_on_rope_grid
from megacogvx.pack_layout import LocalPack, PackLayout, build_layout, place_sample
from megacogvx.parallel.gather import gather_rows
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.patches import patchify, repeated_frames, unpatchify

SEEDS = 1 << 64  # other seeds would stand for one of these


@dataclass(frozen=True)
class SamplingSettings:
    """How latents are sampled.

    Attributes:
        num_steps: sampling steps.
        sampler: deterministic DDIM, or stochastic DPM-Solver++.
        guidance: how the scale runs over the steps (`diffusion/guidance.py`).
        guidance_scale: 1 with constant guidance leaves the branch without text out.
        seed: of all noise.
        repeated_frames: of a model with temporal patches: whether the frames that are repeated in front follow the
            first frame (`copied`: they carried no loss in training) or the model's prediction (`predicted`).
        strength: video to video: how much of the noise schedule is run, in (0, 1]; 1 keeps nothing of the video.
    """

    num_steps: int = 50
    sampler: Literal["ddim", "dpm"] = "ddim"
    guidance: GuidanceSchedule = "constant"
    guidance_scale: float = 6.0
    seed: int = 0
    repeated_frames: Literal["copied", "predicted"] = "copied"
    strength: float = 0.8

    @property
    def is_guided(self) -> bool:
        """Whether the branch without text is needed."""
        return self.guidance != "constant" or self.guidance_scale != 1.0

    def check(self, num_train_timesteps: int, from_video: bool = False) -> None:
        """Raise `ConfigError` when steps don't fit the noise schedule or leave none to a video, or a number is none."""
        if not 1 <= self.num_steps <= num_train_timesteps:
            raise ConfigError(
                f"{self.num_steps} sampling steps don't fit diffusion.num_train_timesteps={num_train_timesteps}; "
                f"any number from 1 to {num_train_timesteps} works, 50 is usual"
            )
        if not math.isfinite(self.guidance_scale):
            raise ConfigError(f"a guidance scale of {self.guidance_scale} is no number to scale with; 6 is usual")
        if not 0 <= self.seed < SEEDS:
            raise ConfigError(f"the seed {self.seed} must lie in 0 .. 2^64 - 1")
        if from_video and (not 0.0 < self.strength <= 1.0 or not self.steps_from_video):
            raise ConfigError(
                f"a strength of {self.strength} leaves no step of {self.num_steps} to a video: it takes a number of at "
                f"least 1 / steps = {1 / self.num_steps:.4g} and at most 1; 0.8 is usual"
            )

    @property
    def steps_from_video(self) -> int:
        """How many of the steps are run when the start is a video; rounded down, as the released pipelines do."""
        return min(int(self.num_steps * self.strength), self.num_steps)


class Denoiser:
    """A transformer and its noise schedule, ready to sample.

    Args:
        model: the transformer; its weights are read only.
        schedule: of its training.
        groups: the layout that the model was built on.
    """

    def __init__(self, model: CogVideoXTransformer, schedule: NoiseSchedule, groups: ParallelGroups) -> None:
        self.model, self.schedule, self.groups = model.eval(), schedule, groups
        self.config = model.config

    @torch.no_grad()
    def sample(
        self,
        text_LE: torch.Tensor,
        null_LE: torch.Tensor,
        shape: tuple[int, int, int, int],
        settings: SamplingSettings,
        place: int = 0,
        image_CHW: torch.Tensor | None = None,
        video_TCHW: torch.Tensor | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> torch.Tensor:
        """Sample the latents of one video.

        Args:
            text_LE: embedding of the prompt, `[L, E]`.
            null_LE: what stands for no prompt, `[L', E]`: zeros where training dropped the text to zeros.
            shape: (T, C, H, W) of the latents, in latent cells.
            settings: steps, sampler, guidance, seed.
            place: number of the video among those of one seed; decides its noise.
            image_CHW: scaled latents of the first frame, which an image-to-video model needs and no other takes.
            video_TCHW: scaled latents of a video to start from, noised to `settings.strength`; None: from noise alone.
            on_step: called when a step begins; None shows a progress of these steps.

        Returns:
            Scaled latents `[T, C, H, W]` fp32, equal on all ranks of the replica.
        """
        frames, *cell = shape
        texts = [null_LE, text_LE] if settings.is_guided else [text_LE]
        copies = repeated_frames(frames, self.config.patch_size_t)
        padded = range(-copies, frames)
        image_TCHW = self._beside_noise(image_CHW, padded, copies)
        pack = _SamplingPack(texts, shape, self.model, self.groups, image_TCHW)
        draw = _Noise(padded, tuple(cell), settings.seed, place, self.groups.device)
        timesteps = ddim_timesteps(settings.num_steps, self.schedule.num_train_timesteps)
        x_TCHW = draw("start")
        if video_TCHW is not None:
            timesteps = timesteps[settings.num_steps - settings.steps_from_video :]
            x_TCHW = self._noised(video_TCHW, x_TCHW, timesteps[0])
        last: tuple[torch.Tensor, int] | None = None
        for step, t in enumerate(timesteps if on_step else progress(timesteps, "sample")):
            if on_step:
                on_step()
            # the released pipelines count the steps that are run, not those of the schedule
            scale = guidance_scale(settings.guidance, settings.guidance_scale, step, t, len(timesteps))
            *without, v_TCHW = pack.predict(x_TCHW, t)
            if without:
                v_TCHW = combine(without[0], v_TCHW, scale)
            if settings.repeated_frames == "copied":
                v_TCHW = self._follow_first_frame(v_TCHW, x_TCHW, t, copies)
            if settings.sampler == "ddim":
                x_TCHW = ddim_step(self.schedule, v_TCHW, x_TCHW, t, settings.num_steps)
            else:
                x_TCHW, x0_TCHW = dpm_step(
                    self.schedule, v_TCHW, x_TCHW, t, settings.num_steps, draw("step", step), last
                )
                last = (x0_TCHW, t)
        return x_TCHW[copies:]

    def _beside_noise(self, image_CHW: torch.Tensor | None, frames: range, copies: int) -> torch.Tensor | None:
        wants_image = self.config.in_channels != self.config.out_channels
        assert wants_image == (image_CHW is not None), f"an image: {image_CHW is not None}, wanted: {wants_image}"
        return None if image_CHW is None else image_channels(image_CHW.to(self.groups.device).float(), frames, copies)

    def _noised(self, video_TCHW: torch.Tensor, noise_TCHW: torch.Tensor, t: int) -> torch.Tensor:
        """Noise the video that sampling starts from; its first frame is repeated in front where the patch asks."""
        copies = len(noise_TCHW) - len(video_TCHW)
        padded_TCHW = torch.cat([video_TCHW[:1].expand(copies, -1, -1, -1), video_TCHW])
        return self.schedule.add_noise(padded_TCHW.to(noise_TCHW.device), noise_TCHW, t)

    def _follow_first_frame(self, v_TCHW: torch.Tensor, x_TCHW: torch.Tensor, t: int, copies: int) -> torch.Tensor:
        """Let the repeated frames in front head for the first frame, whose noisy copies they were in training.

        They carry no loss there, so the model's own prediction for them means nothing.
        """
        if not copies:
            return v_TCHW
        x0_CHW = self.schedule.to_x0(x_TCHW[copies], v_TCHW[copies], t)
        abar = self.schedule.alpha(t)
        front = (abar**0.5 * x_TCHW[:copies] - x0_CHW) / (1.0 - abar) ** 0.5
        return torch.cat([front, v_TCHW[copies:]])


class _Noise:
    """Draws of one video, by latent frame; frames below 0 are the repeated ones in front."""

    def __init__(self, frames: range, shape: tuple[int, ...], seed: int, place: int, device: torch.device) -> None:
        self.frames, self.shape, self.seed, self.place, self.device = frames, shape, seed, place, device

    def __call__(self, what: str, *step: int) -> torch.Tensor:
        noise = draws.normal_frames(self.frames, self.shape, self.seed, f"sampling {what}", self.place, *step)
        return noise.to(self.device)


class _SamplingPack:
    """The branches of guidance as the samples of one pack, and the model applied to it."""

    def __init__(
        self,
        texts: Sequence[torch.Tensor],
        shape: tuple[int, int, int, int],
        model: CogVideoXTransformer,
        groups: ParallelGroups,
        image_TCHW: torch.Tensor | None = None,
    ) -> None:
        self.model, self.groups, self.patch, self.image_TCHW = model, groups, model.config.patch, image_TCHW
        frames, _, height, width = shape
        samples = [
            place_sample(number, frames, height, width, len(text_LE), self.patch)
            for number, text_LE in enumerate(texts)
        ]
        layout = build_layout(samples, self.patch, multiple=groups.tensor[1] * groups.context[1])
        self.layout = place_on_rope_grid(layout, model.config)
        self.local = self.layout.local(groups.tensor, groups.context, groups.device)
        self.dtype = next(model.parameters()).dtype
        self.text_SE = local_text(texts, self.layout, self.local).to(groups.device, self.dtype)

    def predict(self, x_TCHW: torch.Tensor, t: int) -> list[torch.Tensor]:
        """Return the velocity `[T, C, H, W]` fp32 of each branch at timestep t; all start from the same latents."""
        input_TCHW = x_TCHW if self.image_TCHW is None else torch.cat([x_TCHW, self.image_TCHW], dim=1)
        rows_VP = patchify(input_TCHW, self.patch)
        video_SP = torch.cat([rows_VP[:0], *(rows_VP[piece.start : piece.stop] for piece in self.local.video_slices)])
        branches = self.layout.num_samples - 1
        timesteps_M = torch.tensor([t] * branches + [0], dtype=torch.int64, device=self.groups.device)
        predicted_SP = self.model(video_SP.to(self.dtype), self.text_SE, timesteps_M, self.layout)
        predicted_VP = gather_rows(predicted_SP, self.layout, self.groups).float()
        grid = self.layout.samples[0].grid
        return [unpatchify(rows_VP, grid, self.patch) for rows_VP in predicted_VP.chunk(branches)]


def local_text(texts: Sequence[torch.Tensor], layout: PackLayout, local: LocalPack) -> torch.Tensor:
    """Return a rank's text rows `[L_local, E]` of a pack whose samples have `texts` `[L, E]`; zeros for the padding."""
    parts = [texts[0][:0]]
    for piece in local.text_slices:
        if piece.sample < len(texts):
            parts.append(texts[piece.sample][piece.start : piece.stop])
        else:
            parts.append(texts[0].new_zeros(piece.stop - piece.start, texts[0].shape[1]))
    return torch.cat(parts)
