"""The synthetic sample distribution on which packing is measured.

Images and clips of the seed recipe's stages: lengths in tokens (text + video) per sample, with the
stage's token budget. Durations follow a gamma distribution with mean 6 s, limited to 1-10 s and to the
stage's maximum; seven aspect ratios; 8x8x4 latents, 2x2 patches. `cost` is the modelled time in seconds of one
5B layer, forward and backward, linear parts at 700 TFLOP/s and attention at 480 TFLOP/s.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np


class Stage(TypedDict):
    """A stage of the seed recipe.

    Keys:
        budget: tokens of a pack.
        sides: short side in pixels -> (share of the samples, limit of the long side).
        seconds: longest clip.
        fps: (frames per second, share).
    """

    budget: int
    sides: dict[int, tuple[float, int]]
    seconds: float
    fps: tuple[tuple[int, float], ...]


HIDDEN = 3072
TEXT = 226
LINEAR_SECONDS_PER_TOKEN = 72 * HIDDEN**2 / 700e12
ATTENTION_SECONDS_PER_TOKEN_SQUARED = 14 * HIDDEN / 480e12

FPS = ((8, 0.5), (16, 0.5))
STAGES: dict[str, Stage] = {
    "stage1": Stage(budget=25_000, sides={256: (1.0, 384)}, seconds=6, fps=FPS),
    "stage2": Stage(budget=75_000, sides={256: (0.3, 384), 480: (0.7, 720)}, seconds=6, fps=FPS),
    "stage3": Stage(
        budget=700_000, sides={256: (0.15, 384), 480: (0.25, 720), 768: (0.6, 1360)}, seconds=10, fps=((8, 1.0),)
    ),
}
ASPECTS = ((16 / 9, 0.45), (9 / 16, 0.15), (4 / 3, 0.12), (3 / 2, 0.10), (1.0, 0.10), (3 / 4, 0.05), (21 / 9, 0.03))


def sample_lengths(
    stage: str, count: int, seed: int = 0, image_share: float = 0.25, real_text: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw `count` samples; returns int64 arrays (length in tokens, tokens per latent frame, latent frames)."""
    rng, spec = np.random.default_rng(seed), STAGES[stage]
    sides = np.array(list(spec["sides"]))
    side = rng.choice(sides, count, p=[share for share, _ in spec["sides"].values()])
    cap = np.select([side == s for s in sides], [c for _, c in spec["sides"].values()])
    aspect = rng.choice([a for a, _ in ASPECTS], count, p=[p for _, p in ASPECTS])
    long_side = np.minimum(np.round(side * np.maximum(aspect, 1 / aspect) / 16).astype(int) * 16, cap)
    per_frame = (side // 16) * (long_side // 16)
    seconds = np.minimum(np.clip(rng.gamma(5.0, 6.2 / 5.0, count), 1.0, 10.0), spec["seconds"])
    fps = rng.choice([f for f, _ in spec["fps"]], count, p=[p for _, p in spec["fps"]])
    latent_frames = np.floor(seconds * fps).astype(int) // 4 + 1
    latent_frames[rng.random(count) < image_share] = 1
    text = rng.integers(20, TEXT + 1, count) if real_text else TEXT
    lengths = text + latent_frames * per_frame
    return lengths.astype(np.int64), per_frame.astype(np.int64), latent_frames.astype(np.int64)


def cost(lengths: np.ndarray) -> np.ndarray:
    """Modelled seconds of one 5B layer, forward and backward, for samples of these lengths in tokens."""
    lengths = np.asarray(lengths, float)
    return LINEAR_SECONDS_PER_TOKEN * lengths + ATTENTION_SECONDS_PER_TOKEN_SQUARED * lengths**2
