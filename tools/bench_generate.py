#!/usr/bin/env python
"""Sampling and decoding beside diffusers' CogVideoXPipeline: time and the videos' difference.

The same random weights (ours, exported and loaded by diffusers), text embeddings, noise, steps, threads and process;
the sides take turns, and every round's videos are compared. Text is encoded beforehand, by the same T5 on both sides.
Guidance runs both branches in one forward: a pack of two samples here, a batch of two there. The VAE decodes by chunks
of two latent frames, as the pipeline does.

    OMP_NUM_THREADS=1 python tools/bench_generate.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from rich.console import Console
from rich.table import Table

from megacogvx import draws
from megacogvx.conversion.convert import convert
from megacogvx.conversion.part import Kind, Part
from megacogvx.conversion.settings import Conventions, TransformerSettings, VAESettings, encoder_info
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.inference.denoise import Denoiser, SamplingSettings
from megacogvx.inference.load import load_transformer, load_vae
from megacogvx.log import progress
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.tiling import CHUNKED
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups, initialize, shutdown
from megacogvx.testing.drawn_checkpoint import drawn_part
from megacogvx.testing.tolerance import relative_error

SCALE, GUIDANCE, SEED, BOUND = 0.7, 6.0, 11, 1e-4
TEXT_WIDTH = 512
console = Console(width=150)


@dataclass(frozen=True)
class Case:
    """What is generated: sizes of the models, of the video (pixels, frames) and of its text (tokens), and steps."""

    width: int = 512
    layers: int = 6
    vae_width: int = 32
    frames: int = 9
    height: int = 128
    width_pixels: int = 192
    text: int = 64
    steps: int = 6

    def parts(self) -> dict[Kind, Part]:
        """Return random weights of a transformer shaped as the 5B model's, and of a VAE."""
        model = CogVideoXConfig(
            num_layers=self.layers, num_attention_heads=self.width // 64, text_embed_dim=TEXT_WIDTH,
            max_text_seq_length=self.text, use_rotary_positional_embeddings=True, sample_height=self.height // 8,
            sample_width=self.width_pixels // 8, sample_frames=self.frames,
        )  # fmt: skip
        settings = TransformerSettings(
            model, DiffusionConfig(scaling_factor=SCALE), encoder_info(model, SCALE, self.text), Conventions()
        )
        widths = (self.vae_width, 2 * self.vae_width, 2 * self.vae_width, 4 * self.vae_width)
        vae = VAEConfig(block_out_channels=widths, norm_num_groups=self.vae_width // 2, scaling_factor=SCALE)
        return {"transformer": drawn_part(settings), "vae": drawn_part(VAESettings(vae))}

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(T, C, H, W)."""
        return (self.frames - 1) // 4 + 1, 16, self.height // 8, self.width_pixels // 8

    @property
    def texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[L, E]` of a prompt and of none."""
        return draws.normal((self.text, TEXT_WIDTH), 1, "text"), torch.zeros(self.text, TEXT_WIDTH)


@dataclass
class Side:
    """One contestant: how it samples latents `[T, C, H, W]` and decodes them to `[3, T, H, W]`, and its seconds."""

    name: str
    sample: Callable[[], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    sampling: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)

    @torch.no_grad()
    def round(self) -> torch.Tensor:
        """Make the video once, and note how long it took."""
        began = time.perf_counter()
        latents = self.sample()
        sampled = time.perf_counter()
        video = self.decode(latents)
        self.sampling.append(sampled - began)
        self.decoding.append(time.perf_counter() - sampled)
        return video


def our_side(case: Case, folder: Path, groups: ParallelGroups) -> Side:
    """Load our checkpoint."""
    denoiser = Denoiser(
        load_transformer(folder / "transformer", groups, torch.float32), NoiseSchedule(DiffusionConfig()), groups
    )
    vae = load_vae(folder / "vae", torch.device("cpu"), torch.float32)
    settings = SamplingSettings(case.steps, "ddim", "constant", GUIDANCE, SEED, "predicted")

    def decode(latents_TCHW: torch.Tensor) -> torch.Tensor:
        return vae.decode((latents_TCHW / SCALE).transpose(0, 1)[None], CHUNKED)[0]

    return Side(
        "megacogvx", lambda: denoiser.sample(*case.texts, case.latent_shape, settings, on_step=lambda: None), decode
    )


def diffusers_side(case: Case, folder: Path) -> Side:
    """Load our export."""
    pipe = CogVideoXPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    frames, *cell = case.latent_shape
    noise = draws.normal_frames(range(frames), tuple(cell), SEED, "sampling start", 0)
    text, null = case.texts

    def sample() -> torch.Tensor:
        arguments: dict[str, Any] = {"num_frames": case.frames, "height": case.height, "width": case.width_pixels}
        latents = pipe(
            prompt_embeds=text[None], negative_prompt_embeds=null[None], latents=noise[None], **arguments,
            num_inference_steps=case.steps, guidance_scale=GUIDANCE, output_type="latent",
        ).frames  # fmt: skip
        return latents[0]

    return Side("diffusers", sample, lambda latents_TCHW: pipe.decode_latents(latents_TCHW[None])[0])


def compare(case: Case, rounds: int) -> tuple[Side, Side, float]:
    """Let both sides make the video `rounds` times, by turns, after one round that isn't counted.

    Returns:
        Ours, theirs, and the largest relative error of a video.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts, groups = case.parts(), initialize(ParallelConfig(device="cpu"))
        try:
            ours = our_side(case, convert(parts, "megacogvx", Path(folder) / "ours", check=False), groups)
            theirs = diffusers_side(case, convert(parts, "diffusers", Path(folder) / "theirs", check=False))
            worst = 0.0
            for turn in progress(range(rounds + 1), "round"):
                first, second = (ours, theirs) if turn % 2 else (theirs, ours)
                videos = {side.name: side.round() for side in (first, second)}
                worst = max(worst, relative_error(videos["megacogvx"], videos["diffusers"]))
        finally:
            shutdown()
    for side in (ours, theirs):
        del side.sampling[0], side.decoding[0]
    return ours, theirs, worst


def report(case: Case, ours: Side, theirs: Side, worst: float) -> bool:
    """Print the medians and their ratio; return whether the videos are equal and ours is no slower."""
    table = Table("seconds, median (smallest)", "sampling", f"of {case.steps} steps, one", "decoding", "both")
    totals = {}
    for side in (ours, theirs):
        both = [a + b for a, b in zip(side.sampling, side.decoding, strict=True)]
        totals[side.name] = statistics.median(both)
        columns = (side.sampling, [seconds / case.steps for seconds in side.sampling], side.decoding, both)
        table.add_row(side.name, *(f"{statistics.median(times):.3f} ({min(times):.3f})" for times in columns))
    ratios = [
        statistics.median(mine) / statistics.median(other)
        for mine, other in ((ours.sampling, theirs.sampling), (ours.decoding, theirs.decoding))
    ]
    ratio = totals["megacogvx"] / totals["diffusers"]
    table.add_row("ours / theirs", f"{ratios[0]:.3f}", "", f"{ratios[1]:.3f}", f"{ratio:.3f}")
    console.print(table)
    print(f"largest relative error of the videos: {worst:.1e} (bound {BOUND:.0e})")
    return worst <= BOUND and ratio <= 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sampling and decoding beside diffusers' CogVideoXPipeline.")
    for name, default in vars(Case()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--rounds", type=int, default=7, help="that are counted, of each side (default: 7)")
    arguments = vars(parser.parse_args())
    rounds, case = arguments.pop("rounds"), Case(**arguments)
    print(f"{case}, {torch.get_num_threads()} thread(s), fp32 on the CPU, {rounds} rounds")
    report(case, *compare(case, rounds))


if __name__ == "__main__":
    main()
