"""The sides that `bench_vae.py` compares: our VAE and diffusers', same weights and inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLCogVideoX

from megacogvx import draws
from megacogvx.conversion.published_names import diffusers_vae
from megacogvx.conversion.tensors import InMemory, translate
from megacogvx.models.vae import CHUNKED, TILED, WHOLE, Coding, CogVideoXVAE, VAEConfig, initialize_weights

ALL_FRAMES = 10**6
SMALLER = (9, 32, 32)  # of a run that only warms up
CODINGS = {"whole": WHOLE, "chunked": CHUNKED, "tiled": TILED}
PARTS = ("encode", "decode")


@dataclass(frozen=True)
class Case:
    """What is computed: `part` of a clip of (T, H, W) pixels, with `mode` of `CODINGS`."""

    part: str
    mode: str
    size: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        """Return what a table is headed with."""
        return f"{self.part}, {self.mode}, {' x '.join(map(str, self.size))}, {str(self.dtype)[6:]}"

    @property
    def coding(self) -> Coding:
        """How much is coded at once."""
        return CODINGS[self.mode]

    def input(self, config: VAEConfig) -> torch.Tensor:
        """Return pixels in [-1, 1] or latents N(0, 1)."""
        if self.part == "encode":
            x = draws.normal((1, config.in_channels, *self.size), 0, "video").tanh()
        else:
            x = draws.normal((1, *config.latent_shape(*self.size)), 0, "latents")
        return x.to(self.device, self.dtype)


def our_model(config: VAEConfig, dtype: torch.dtype, device: str) -> CogVideoXVAE:
    """Make our model with drawn weights, biases and norms that aren't trivial."""
    model = CogVideoXVAE(config)
    initialize_weights(model, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * draws.normal(tuple(parameter.shape), 1, name)
    return model.to(device, dtype).eval().requires_grad_(False)


def diffusers_model(ours: CogVideoXVAE) -> AutoencoderKLCogVideoX:
    """Make diffusers' model with our weights."""
    config = ours.config
    stages, parameter = len(config.block_out_channels), next(ours.parameters())
    theirs = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * stages,
        up_block_types=("CogVideoXUpBlock3D",) * stages,
        block_out_channels=config.block_out_channels,
        latent_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        temporal_compression_ratio=config.temporal_compression_ratio,
    )
    theirs.load_state_dict(dict(translate(InMemory(ours.state_dict()), diffusers_vae(config))))
    return theirs.to(parameter.device, parameter.dtype).eval().requires_grad_(False)


class Ours:
    """Our side of a case."""

    name = "megacogvx"

    def __init__(self, model: CogVideoXVAE, case: Case) -> None:
        self.model, self.case, self.x = model, case, case.input(model.config)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Return moments or pixels."""
        code = self.model.encode if self.case.part == "encode" else self.model.decode
        result: torch.Tensor = code(self.x, self.case.coding)
        return result

    def smaller(self) -> Ours:
        """Return the same computation on a small clip."""
        return Ours(self.model, replace(self.case, size=SMALLER))


class Theirs:
    """Diffusers' side of a case; whole clips by a batch of frames that none exceeds."""

    name = "diffusers"

    def __init__(self, model: AutoencoderKLCogVideoX, case: Case, x: torch.Tensor) -> None:
        self.model, self.case, self.x = model, case, x

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Return moments or pixels."""
        model = self.model
        chunk = self.case.coding.latents_per_chunk
        model.num_latent_frames_batch_size = chunk or ALL_FRAMES
        model.num_sample_frames_batch_size = (chunk or ALL_FRAMES) * int(model.config.temporal_compression_ratio)
        model.use_tiling = self.case.coding.tile is not None
        if self.case.part == "encode":
            moments: torch.Tensor = model._encode(self.x)
            return moments
        pixels: torch.Tensor = model.decode(self.x).sample
        return pixels

    def smaller(self) -> Theirs:
        """Return the same computation on a small clip."""
        small = self.x[:, :, :3, :4, :4] if self.case.part == "decode" else self.x[:, :, :9, :32, :32]
        return Theirs(self.model, replace(self.case, size=SMALLER), small)
