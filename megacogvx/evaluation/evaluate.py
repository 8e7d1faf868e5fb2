"""`megacogvx evaluate`: how well a VAE keeps the videos and images of a folder, as a table, JSON and CSV.

PSNR, SSIM and flickering are those of `reconstruction.py`, of the unrounded reconstruction, decoded from the means; the
perceptual distance is LPIPS where its weights are given, else that of a small random net, which is named so.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console

from megacogvx.config import build_config
from megacogvx.data.clips import LIST_NAME, read_clips
from megacogvx.data.images import read_image
from megacogvx.data.transforms import to_model_range
from megacogvx.data.video import read_frames
from megacogvx.errors import ConfigError, DataError
from megacogvx.evaluation.reconstruction import flickering, psnr, ssim
from megacogvx.evaluation.scores import Scores, averages, table, write
from megacogvx.inference.coding import add_coding_arguments, coding_of
from megacogvx.inference.load import load_vae
from megacogvx.log import get_logger, progress
from megacogvx.models.vae import WHOLE, Coding, CogVideoXVAE, VAELoss, VAELossConfig

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EXAMPLE = """\
examples:
  megacogvx evaluate --vae runs/vae --videos clips --output scores
  megacogvx evaluate --vae CogVideoX-5b --videos clips --vae-mode tiled --pad --dtype bf16

Writes OUT/reconstruction.json and reconstruction.csv. The VAE is a run folder, a checkpoint or a diffusers folder.
"""

logger = get_logger(__name__)


class Evaluator:
    """A VAE and how it is measured."""

    def __init__(self, vae: CogVideoXVAE, loss: VAELoss, coding: Coding = WHOLE, pad: bool = False) -> None:
        """Keep what measures.

        Args:
            vae: in evaluation mode.
            loss: its perceptual net is taken.
            coding: how much the VAE codes at once.
            pad: pad what doesn't divide, and compare what was there before.
        """
        assert loss.perceptual is not None, "an evaluation has a perceptual net"
        self.vae, self.coding, self.pad = vae, coding, pad
        parameter = next(vae.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.perceptual, self.perceptual_name = loss.perceptual.to(self.device), loss.perceptual_name

    @torch.no_grad()
    def measure(self, file: str, frames_THW3: torch.Tensor) -> Scores:
        """Reconstruct uint8 frames `[T, H, W, 3]` and compare.

        Raises:
            DataError: the size doesn't suit the VAE (and padding isn't asked for) or the metrics.
        """
        video_BCTHW = to_model_range(frames_THW3)[None].to(self.device)
        try:
            result_BCTHW = self.vae.reconstruct(video_BCTHW.to(self.dtype), self.coding, self.pad).float()
            return self._scores(file, video_BCTHW, result_BCTHW)
        except DataError as error:
            raise DataError(f"{file}: {error}") from None

    def _scores(self, file: str, video_BCTHW: torch.Tensor, result_BCTHW: torch.Tensor) -> Scores:
        frames, height, width = video_BCTHW.shape[2:]
        # Frame by frame where a mean over frames is meant anyway: the metrics compute in fp64.
        pairs = list(zip(video_BCTHW.split(1, dim=2), result_BCTHW.split(1, dim=2), strict=True))
        still = frames == 1
        return Scores(
            file, frames, height, width,
            psnr=float(psnr(video_BCTHW, result_BCTHW)),
            ssim=fmean(float(ssim(a, b)) for a, b in pairs),
            perceptual=fmean(float(self.perceptual(a, b.clamp(-1, 1))) for a, b in pairs),
            flickering=None if still else float(flickering(video_BCTHW)),
            flickering_reconstruction=None if still else float(flickering(result_BCTHW)),
        )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    add = parser.add_argument
    add("--vae", type=Path, required=True, help="run folder or checkpoint of a VAE, or a diffusers folder")
    add("--videos", type=Path, required=True, help=f"folder of videos and images, or of {LIST_NAME}; or one file")
    add("--output", type=Path, help="folder for reconstruction.json and .csv (default: the table alone)")
    add("--frames", type=int, help="of each video, from its first one on; shorter ones are left out (default: all)")
    add("--pad", action="store_true", help="pad sizes that the VAE can't take, and cut the result back")
    add("--skip-bad", action="store_true", help="leave out and count files that can't be read or measured")
    add("--lpips-backbone", type=Path, help="torchvision's VGG-16 weights; with --lpips-heads, LPIPS is measured")
    add("--lpips-heads", type=Path, help="the lpips package's weights/v0.1/vgg.pth")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the VAE (default: fp32)")
    add_coding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run `megacogvx evaluate`.

    Raises:
        ConfigError: an option is out of range.
        CheckpointError: there is no VAE, or LPIPS's weights aren't what they should be.
        DataError: there is nothing to measure, or a file can't be read or doesn't suit the VAE.
    """
    loss = VAELoss(perceptual_config(arguments.lpips_backbone, arguments.lpips_heads))
    coding, device = coding_of(arguments), _device(arguments.device)
    if arguments.frames is not None and arguments.frames < 1:
        raise ConfigError(f"--frames {arguments.frames} must be 1 or more")
    files = find_files(arguments.videos)
    vae = load_vae(arguments.vae, device, torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    evaluator = Evaluator(vae, loss, coding, arguments.pad)
    scores = measure_files(evaluator, files, arguments.frames, arguments.skip_bad)
    if not scores:
        raise DataError(f"none of {len(files)} files of {arguments.videos} could be measured: see the lines above")
    means = averages(scores)
    Console(width=150).print(table(f"{arguments.vae}, {coding}", scores, means, evaluator.perceptual_name))
    if arguments.output is not None:
        facts = {"vae": str(arguments.vae), "coding": str(coding), "padded": arguments.pad, "dtype": arguments.dtype}
        write(arguments.output, facts, scores, means, evaluator.perceptual_name)


def measure_files(evaluator: Evaluator, files: Sequence[Path], frames: int | None, skip_bad: bool) -> list[Scores]:
    """Return the scores of those files that have enough `frames`.

    Raises:
        DataError: a file can't be read or doesn't suit the VAE, and `skip_bad` is off.
    """
    scores: list[Scores] = []
    left_out: Counter[str] = Counter()
    for file in progress(files, "evaluate"):
        try:
            frames_THW3 = read_pixels(file, frames)
            if frames_THW3 is None:
                left_out["file of fewer than --frames"] += 1
                logger.warning("left out: %s has fewer than --frames %d frames", file.name, frames)
                continue
            scores.append(evaluator.measure(file.name, frames_THW3))
        except DataError as error:
            if not skip_bad:
                raise
            left_out["file that can't be read or measured"] += 1
            logger.warning("left out: %s", error)
            continue
        if math.isnan(scores[-1].psnr):
            logger.warning("the VAE makes NaN of %s, and so of the means", file.name)
    for reason, count in sorted(left_out.items()):
        logger.warning("left out: %d x %s", count, reason)
    return scores


def perceptual_config(backbone: Path | None, heads: Path | None) -> VAELossConfig:
    """Return the choice of net: LPIPS where a file of its weights is given.

    Raises:
        ConfigError: one of the two is missing.
    """
    if backbone is None and heads is None:
        return VAELossConfig(perceptual="random_net")
    names = {"lpips_backbone": backbone, "lpips_heads": heads}
    given = {name: str(path) for name, path in names.items() if path is not None}
    return build_config(VAELossConfig, {"perceptual": "lpips", **given})


def find_files(path: Path) -> list[Path]:
    """Return the videos and images of a folder, in the order of its list or of their names.

    Raises:
        DataError: there is none, or the list is damaged.
    """
    if path.is_file() and path.name != LIST_NAME:
        return [path]
    if path.name == LIST_NAME or (path / LIST_NAME).is_file():
        return [clip.path for clip in read_clips(path)]
    known = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
    files = sorted(file for file in path.glob("*") if file.suffix.lower() in known)
    if not files:
        raise DataError(f"{path} holds no video or image ({', '.join(suffix[1:] for suffix in known)})")
    return files


def read_pixels(file: Path, frames: int | None) -> torch.Tensor | None:
    """Read uint8 `[T, H, W, 3]`: an image, all of a video, or its first `frames`; None if it has fewer.

    Raises:
        DataError: the file can't be decoded.
    """
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return read_image(file)[None]
    frames_THW3 = read_frames(file, count=frames, fewer=True)
    return None if frames is not None and len(frames_THW3) < frames else frames_THW3


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
