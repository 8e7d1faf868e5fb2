"""The verb `report`: runs, samples, dataset and timings as one HTML page that needs no other file.

What isn't there is said to be missing; nothing is filled in.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean

from megacogvx import __version__
from megacogvx.data.video import written_beside
from megacogvx.errors import ConfigError
from megacogvx.evaluation import page
from megacogvx.evaluation.run_folder import Row, RunFolder, Sample, read_samples, read_steps
from megacogvx.evaluation.sections import (
    absent,
    config_section,
    dataset_section,
    duration,
    samples_section,
    steps_section,
    training_section,
    vae_section,
)
from megacogvx.log import get_logger

EXAMPLE = """\
example:
  megacogvx report --vae-run runs/vae --train-run runs/transformer --samples samples --dataset dataset \\
      --output report.html
"""

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report`."""
    add = parser.add_argument
    add("--vae-run", type=Path, help="run folder of a VAE training")
    add("--train-run", type=Path, action="append", default=[], help="run folder of a pretraining; may be given again")
    add("--samples", type=Path, help="folder of generated videos")
    add("--dataset", type=Path, help="folder of the indexed dataset")
    add(
        "--steps-file",
        type=Path,
        help='JSON of the commands that were run: {name: {"seconds": 12.3, "command": [...]}}',
    )
    add("--title", default="CogVideoX pretraining", help="heading of the page")
    add("--output", type=Path, default=Path("report.html"), help="the page (default: report.html)")


def run(arguments: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        ConfigError: there is nothing to report on.
    """
    if not (arguments.vae_run or arguments.train_run or arguments.samples or arguments.dataset or arguments.steps_file):
        raise ConfigError("nothing to report on; give --train-run, --vae-run, --samples, --dataset or --steps-file")
    content = build(arguments)
    with written_beside(arguments.output) as beside:
        beside.write_text(content)
    logger.info("wrote %s (%.1f MB)", arguments.output, len(content) / 1e6)


def build(arguments: argparse.Namespace) -> str:
    """Return the page as HTML."""
    trainings = [RunFolder.read(folder) for folder in arguments.train_run]
    vae = RunFolder.read(arguments.vae_run) if arguments.vae_run else None
    samples = read_samples(arguments.samples) if arguments.samples else None
    steps = read_steps(arguments.steps_file) if arguments.steps_file else None
    parts = [
        page.cards(summary(trainings, vae, samples, steps)),
        samples_section(samples, arguments.samples),
        *([training_section(run) for run in trainings] or [absent("Pretraining", "--train-run")]),
        vae_section(vae) if vae else absent("VAE", "--vae-run"),
        dataset_section(arguments.dataset) if arguments.dataset else absent("Dataset", "--dataset"),
        steps_section(steps, arguments.steps_file) if arguments.steps_file else absent("Timings", "--steps-file"),
        config_section([*trainings, *([vae] if vae else [])]),
        page.section("What is still thin", page.bullets(thin(trainings, vae, samples))),
    ]
    made = datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    return page.document(arguments.title, f"megacogvx {__version__}, {made}", "\n".join(parts))


def summary(
    trainings: Sequence[RunFolder], vae: RunFolder | None, samples: list[Sample] | None, steps: dict[str, Row] | None
) -> list[tuple[str, str]]:
    """Return the numbers at the top: (number, what it is)."""
    cards = []
    if samples:
        cards.append((str(len(samples)), "generated video" + ("s" if len(samples) > 1 else "")))
    for run in trainings:
        losses = run.values("loss")
        if losses:
            cards.append((f"{_edge(losses, 0):.3f} → {_edge(losses, 1):.3f}", f"loss over {len(losses)} steps"))
        if run.values("pack_fill"):
            cards.append((f"{100 * fmean(run.values('pack_fill')):.1f} %", "mean pack fill"))
        if len(run.layouts) > 1:
            cards.append((f"{len(run.layouts)} layouts", " → ".join(layout for _, layout in run.layouts)))
    if vae and vae.values("psnr"):
        cards.append((f"{vae.values('psnr')[-1]:.1f} dB", "VAE, PSNR on held-out clips"))
    if steps:
        cards.append((duration(sum(step["seconds"] for step in steps.values())), "all commands"))
    return cards


def thin(trainings: Sequence[RunFolder], vae: RunFolder | None, samples: list[Sample] | None) -> list[str]:
    """Return what the numbers above can't tell, from what is in them."""
    items = []
    for run in trainings:
        if run.rows:
            items.append(
                f"{run.folder.name} has seen {run.total('samples')} samples in {len(run.rows)} steps; the published "
                "models saw tens of millions of clips. A run of this size shows that the road works, not how good a "
                "model gets."
            )
        if len(run.layouts) == 1:
            items.append(f"{run.folder.name} ran on one layout only ({run.layouts[0][1]}).")
    if vae and vae.values("perceptual_random_net"):
        items.append(
            "The VAE's perceptual term compares features of a network with random weights, not of a trained one."
        )
    if vae and not vae.values("psnr"):
        items.append("The VAE was not measured on held-out clips.")
    if samples:
        prompts = len({sample.facts.get("prompt") for sample in samples})
        items.append(
            f"{len(samples)} video(s) of {prompts} prompt(s) are shown as they came out; none is scored for quality, "
            "motion or agreement with its prompt."
        )
    items.append("Losses are of the training data; there is no held-out loss of the transformer.")
    return items


def _edge(values: list[float], end: int) -> float:
    """Return the mean of the first (end=0) or last tenth of the values."""
    count = max(1, len(values) // 10)
    return fmean(values[-count:] if end else values[:count])
