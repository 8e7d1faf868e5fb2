"""Config section `diffusion`: the noise schedule, the choice of timesteps and the mean that the loss takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megacogvx.config import Section

TimestepSampling = Literal["uniform_sample", "uniform_pack", "independent"]
LossMean = Literal["sample", "token"]
DroppedText = Literal["zeros", "empty"]


class DiffusionConfig(Section):
    """What is asked of the model.

    Attributes:
        num_train_timesteps: length T of the noise schedule.
        snr_shift: s of `abar / (s + (1 - s) * abar)`; 1 for CogVideoX-5B and 1.5, 3 for CogVideoX-2B.
        scaling_factor: what latents are multiplied by before noise is added; None takes the dataset's.
        timestep_sampling: how the timesteps of one step share [0, T): one stratum per sample (`uniform_sample`), one
            per pack (`uniform_pack`, the paper's), or none (`independent`); see `timesteps.py`.
        conditioning_dropout: probability that a sample's text is replaced, for classifier-free guidance.
        dropped_text: by what: zeros (as in the official training), or the encoded empty prompt, which diffusers'
            pipelines guide with; it needs `text.encoder` and padded texts. Guidance in `generate` follows it.
        loss_mean: whether every sample (`sample`) or every video token (`token`) weighs the same in the loss.
    """

    num_train_timesteps: int = Field(1000, ge=2)
    snr_shift: float = Field(1.0, gt=0.0)
    scaling_factor: float | None = Field(None, gt=0.0)
    timestep_sampling: TimestepSampling = "uniform_sample"
    conditioning_dropout: float = Field(0.1, ge=0.0, le=1.0)
    dropped_text: DroppedText = "zeros"
    loss_mean: LossMean = "sample"
