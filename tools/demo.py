"""The whole road on one small machine: real clips in, a pretrained tiny CogVideoX, a generated video and a report out.

Each step is a command of its own, printed before it runs. A finished step isn't done again, so an interrupted demo
continues where it was. With no GPU everything runs on the CPU; with one, single-process steps use it, and the
two-process layouts stay on the CPU, since two processes don't share a card.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parents[1]
CONFIGS = PROJECT / "examples" / "configs"
PROMPT = "A cyclist rides past a row of parked cars in low sunlight."


def steps(folder: Path, one_gpu: bool) -> dict[str, list[str]]:
    """Return name -> command of every step, in order, all files under `folder`."""
    python, megacogvx = [sys.executable], [sys.executable, "-m", "megacogvx"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    two_ranks = [*torchrun, "megacogvx"]
    vae, runs, dataset, text = folder / "vae", folder / "transformer", folder / "dataset", folder / "text_encoder"
    captions, samples, clips = folder / "videos" / "captions.jsonl", folder / "samples", folder / "clips"
    train = ["train", "--config", str(CONFIGS / "demo.yaml"), f"data.paths=[{dataset}]", f"training.run_folder={runs}"]
    return {
        "fetch videos": [*python, str(PROJECT / "examples" / "fetch_demo_videos.py"), str(folder / "videos")],
        "clips": [*megacogvx, "clips", "--captions", str(captions), "--output", str(clips),
                  "--short-sides", "64", "48", "--frames", "1", "9", "17", "--fps", "16"],
        "text encoder": [*python, str(PROJECT / "examples" / "tiny_text_encoder.py"), "--captions", str(captions),
                         "--output", str(text)],
        "train the VAE": [*(megacogvx if one_gpu else two_ranks), "train-vae",
                          "--config", str(CONFIGS / "vae_demo.yaml"), f"clips.paths=[{clips}]",
                          f"training.run_folder={vae}"],
        "encode": [*megacogvx, "encode", "--clips", str(clips), "--vae", str(vae), "--text-encoder", str(text),
                   "--text-length", "80", "--measure-clips", "16", "--output", str(dataset)],
        "pretrain, tensor parallel 2": [*two_ranks, *train, "training.steps=80", "parallel.tensor_parallel_size=2"],
        "pretrain, context parallel 2": [*two_ranks, *train, "training.steps=160", "parallel.context_parallel_size=2"],
        "generate": [*megacogvx, "generate", "--checkpoint", str(runs), "--vae", str(vae), "--text-encoder", str(text),
                     "--prompt", PROMPT, "--frames", "17", "--height", "64", "--width", "144", "--steps", "25",
                     "--output", str(samples), "--overwrite"],
        "report": [*megacogvx, "report", "--vae-run", str(vae), "--train-run", str(runs), "--samples", str(samples),
                   "--dataset", str(dataset), "--steps-file", str(folder / "steps.json"),
                   "--output", str(folder / "report.html")],
    }  # fmt: skip


def run_step(name: str, command: list[str]) -> float:
    """Run one command, its output to the terminal, and return the seconds it took; the demo stops if it fails."""
    print(f"\n=== {name}\n{' '.join(command).replace(sys.executable, 'python')}", flush=True)
    start = time.monotonic()
    threads = {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {}
    status = subprocess.run(command, cwd=PROJECT, env={**os.environ, **threads}).returncode
    if status:
        sys.exit(f"demo: the step {name!r} failed with status {status}; run the same command again to continue")
    return time.monotonic() - start


def main() -> None:
    """Run the steps that aren't done yet, remembering each as it finishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PROJECT / "demo_run", help="folder of everything the demo makes")
    folder = parser.parse_args().output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    book = folder / "steps.json"
    done = json.loads(book.read_text()) if book.exists() else {}
    one_gpu = torch.cuda.device_count() == 1
    if one_gpu:
        print("one GPU: single processes use it; the two-process layouts stay on the CPU")
    for name, command in steps(folder, one_gpu).items():
        if done.get(name, {}).get("command") == command:
            print(f"=== {name}: done before, in {done[name]['seconds']:.0f} s")
            continue
        seconds = run_step(name, command)
        done[name] = {"seconds": round(seconds, 1), "command": command}
        temporary = book.with_suffix(".tmp")
        temporary.write_text(json.dumps(done, indent=1))
        temporary.replace(book)
    print(f"\nreport: {folder / 'report.html'}\nvideo:  {folder / 'samples'}")


if __name__ == "__main__":
    main()
