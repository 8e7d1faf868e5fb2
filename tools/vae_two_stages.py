"""Both stages of VAE training in small, one after the other, measured on the same held-out clips of the demo.

    python tools/vae_two_stages.py --clips demo_run/clips --output demo_run

Stage 1 runs on two data-parallel processes, stage 2 on four, which share the frames of each clip; a stage that was
interrupted continues. Fails unless stage 1 raises PSNR above that of the untrained model, and stage 2 stays within
0.5 dB of stage 1. About five minutes of CPU time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from megacogvx.config import load_config
from megacogvx.data.clip_loader import ClipLoader
from megacogvx.evaluation.reconstruction import psnr
from megacogvx.inference.load import load_vae
from megacogvx.log import get_logger
from megacogvx.models.vae import CogVideoXVAE, gaussian, initialize_weights
from megacogvx.training.vae_config import VAETrainConfig

PROJECT = Path(__file__).resolve().parents[1]
CONFIGS = PROJECT / "examples" / "configs"
STAGES = {"vae_tiny": 2, "vae_tiny_stage2": 4}  # name of config and run folder -> processes
MOST_LOST = 0.5  # dB, by stage 2
SIDE, FRAMES = 64, 17  # of the clips that are measured, larger and longer than those of stage 1
logger = get_logger("megacogvx.tools.vae_two_stages")


def settings(stage: str, clips: Path, output: Path) -> list[str]:
    """Return the overrides of a stage: where its clips are, where it starts and where it goes."""
    found = [f"clips.paths=[{clips}]", f"training.run_folder={output / stage}"]
    return found if stage == "vae_tiny" else [*found, f"training.start_from={output / 'vae_tiny'}"]


def train(stage: str, ranks: int, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(PROJECT / "examples" / "train_vae.py"), "--config", str(CONFIGS / f"{stage}.yaml")]
    subprocess.run([*command, *overrides], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@torch.no_grad()
def measure(model: CogVideoXVAE, videos: Sequence[torch.Tensor]) -> float:
    """Return the mean PSNR of the videos' reconstructions, in dB."""
    return fmean(float(psnr(video, model.decode(gaussian.mode(model.encode(video)))).mean()) for video in videos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=PROJECT / "demo_run" / "clips", help="what the demo cut")
    parser.add_argument("--output", type=Path, default=PROJECT / "demo_run", help="folder of the two run folders")
    arguments = parser.parse_args()
    clips, output = arguments.clips.resolve(), arguments.output.resolve()
    config = load_config(VAETrainConfig, CONFIGS / "vae_tiny.yaml", settings("vae_tiny", clips, output))
    larger = config.clips.model_copy(update={"held_out_height": SIDE, "held_out_width": SIDE})
    held_out = [(c, v) for c, v in ClipLoader(larger, config.training.seed).held_out_videos() if not c.is_image]
    longest = larger.model_copy(update={"frames": FRAMES, "fps": (16.0,)})
    held_out += list(ClipLoader(longest, config.training.seed).held_out_videos())
    videos = [video for _, video in held_out]
    untrained = CogVideoXVAE(config.vae)
    initialize_weights(untrained, config.training.seed)
    found: dict[str, float] = {}

    def tell(when: str, model: CogVideoXVAE) -> None:
        found[when] = measure(model, videos)
        logger.info("PSNR of %d held-out clips %s: %.2f dB", len(videos), when, found[when])

    tell("before stage 1", untrained)
    for number, (stage, ranks) in enumerate(STAGES.items(), start=1):
        train(stage, ranks, settings(stage, clips, output))
        tell(f"after stage {number}", load_vae(output / stage, torch.device("cpu"), torch.float32))
    before, first, second = found.values()
    if first <= before or second <= before or second < first - MOST_LOST:
        sys.exit(f"the two stages don't keep what they promise: {found}")


if __name__ == "__main__":
    main()
