"""The noise schedule: how much of the clean latents is left at timestep t, and the velocity that the model predicts.

Scaled-linear betas, shifted in signal-to-noise ratio, then rescaled so that the last timestep is pure noise (Lin et
al. 2023, "Common diffusion noise schedules and sample steps are flawed", algorithm 1); v-prediction (Salimans and Ho
2022). Equal to diffusers' CogVideoXDDIMScheduler with `rescale_betas_zero_snr=True`.
"""

from __future__ import annotations

import torch

from megacogvx.diffusion.config import DiffusionConfig

BETA_START, BETA_END = 0.00085, 0.012
Timesteps = int | torch.Tensor


class NoiseSchedule:
    """abar_t, t in [0, T), and the mixtures of clean latents x0, noise eps, noisy latents xt and velocity v.

        xt = sqrt(abar) x0 + sqrt(1 - abar) eps
        v  = sqrt(abar) eps - sqrt(1 - abar) x0
        x0 = sqrt(abar) xt - sqrt(1 - abar) v

    A timestep is one integer, or an int64 tensor (best on the host, where reading it doesn't wait for a GPU) whose
    shape leads the latents' shape: `[M]` for `[M, T, C, H, W]`, `[V]` for rows `[V, P]`. Mixtures are fp32.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.num_train_timesteps = config.num_train_timesteps
        self.alphas_cumprod = alphas_cumprod(config.num_train_timesteps, config.snr_shift)  # fp64 [T], on the host

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: Timesteps) -> torch.Tensor:
        """Return the noisy latents xt, fp32."""
        signal, sigma = self._coefficients(t, x0)
        return signal * x0.float() + sigma * noise.float()

    def velocity(self, x0: torch.Tensor, noise: torch.Tensor, t: Timesteps) -> torch.Tensor:
        """Return the target v, fp32."""
        signal, sigma = self._coefficients(t, x0)
        return signal * noise.float() - sigma * x0.float()

    def to_x0(self, xt: torch.Tensor, v: torch.Tensor, t: Timesteps) -> torch.Tensor:
        """Return the clean latents that xt and the velocity v imply, fp32."""
        signal, sigma = self._coefficients(t, xt)
        return signal * xt.float() - sigma * v.float()

    def alpha(self, t: int) -> float:
        """Return abar_t; 1 (no noise) for t < 0, where a sampler's last step lands."""
        return 1.0 if t < 0 else float(self.alphas_cumprod[t])

    def _coefficients(self, t: Timesteps, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.as_tensor(t).cpu()
        assert t.shape == like.shape[: t.dim()], f"timesteps {tuple(t.shape)} don't lead {tuple(like.shape)}"
        abar = self.alphas_cumprod[t].reshape(*t.shape, *[1] * (like.dim() - t.dim()))
        return abar.sqrt().float().to(like.device), (1 - abar).sqrt().float().to(like.device)


def alphas_cumprod(num_train_timesteps: int, snr_shift: float) -> torch.Tensor:
    """Return abar_t, fp64 `[T]`, falling from nearly 1 to exactly 0.

    The order matters: the shift first, then the rescaling of sqrt(abar), which keeps the first value and moves the
    last one to zero.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    abar = torch.cumprod(1.0 - betas, dim=0)
    abar = abar / (snr_shift + (1.0 - snr_shift) * abar)
    root = abar.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2
