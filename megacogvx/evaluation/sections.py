"""The sections of the report, one function each: inputs to HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.video import read_frames
from megacogvx.errors import DataError
from megacogvx.evaluation import charts, page
from megacogvx.evaluation.charts import BLUE, GREEN, ORANGE, PURPLE, Line
from megacogvx.evaluation.run_folder import Row, RunFolder, Sample, number
from megacogvx.inference.video_file import contact_sheet

MAX_VIDEO_BYTES = 64 << 20  # of all videos inside the page; browsers grow slow beyond
DEFAULT_TIMESTEPS = 1000
SAMPLE_FACTS = {
    "transformer_step": "training step",
    "num_steps": "sampling steps",
    "sampler": "sampler",
    "guidance_scale": "guidance",
    "seed": "seed",
    "layout": "layout",
}


def absent(title: str, option: str) -> str:
    """Return the section of an input that was not given."""
    return page.section(title, page.missing(f"{option} was not given."))


def samples_section(samples: list[Sample] | None, folder: Path | None) -> str:
    """Return the generated videos, each with a contact sheet of its frames."""
    title = "Generated videos"
    if samples is None:
        return absent(title, "--samples")
    if not samples:
        return page.section(title, page.missing(f"{folder} holds no MP4 file."))
    parts, used = [], 0
    for sample in samples:
        used += sample.path.stat().st_size
        parts.append(_sample(sample, inside=used <= MAX_VIDEO_BYTES))
    return page.section(title, *parts)


def _sample(sample: Sample, inside: bool) -> str:
    facts = sample.facts
    try:
        frames = read_frames(sample.path)
    except DataError as error:
        return page.missing(str(error))
    across = min(9, max(1, round(13 * frames.shape[1] / frames.shape[2])))  # more of narrow frames, fewer of wide ones
    sheet = contact_sheet(frames, columns=across, rows=2 if len(frames) > across else 1)
    settings = ", ".join(f"{label} {facts[key]}" for key, label in SAMPLE_FACTS.items() if facts.get(key) is not None)
    if number(facts.get("seconds")):
        settings += f", made in {duration(facts['seconds'])}"
    size = f"{len(frames)} frames of {frames.shape[1]} x {frames.shape[2]} pixels (H x W)"
    prompt = f"“{facts['prompt']}”" if facts.get("prompt") else f"{sample.path.name} (no settings beside it)"
    full = f"{sample.path.name} itself; the page holds enough video already."
    film = page.video(sample.path) if inside else page.missing(full)
    note = f"<div>{page.paragraph(prompt)}<small>{page.text(size)}<br>{page.text(settings)}</small></div>"
    caption = "Its frames, from the first to the last, left to right and down."
    return f'<div class="video">{film}{note}</div>' + page.figure(page.pixels(sheet, prompt), caption)


def training_section(run: RunFolder) -> str:
    """Return the curves of one pretraining."""
    title, problems = f"Pretraining: {run.folder.name}", [page.missing(problem) for problem in run.problems]
    if not run.rows:
        return page.section(title, *problems)
    seconds = run.values("seconds")
    pace = f" A step takes {median(seconds):.2f} s (median)." if seconds else ""
    shown = [
        page.paragraph(f"{len(run.rows)} steps, {run.total('samples')} samples, {run.total('tokens')} tokens.{pace}"),
        page.figure(
            charts.lines(
                run.steps, [Line("loss", run.column("loss"))], "loss (mean squared error of v)", marks=run.layouts
            ),
            "Training loss: each step, and its moving mean. "
            + (
                "Dashed: the layout (tensor, context, data ranks) changes, from a checkpoint."
                if len(run.layouts) > 1
                else ""
            ),
        ),
        _intervals(run),
        _packing(run),
        _optimizer(run),
    ]
    return page.section(title, *problems, *shown)


def _intervals(run: RunFolder) -> str:
    rows = [(row["step"], [number(loss) for loss in row["loss_by_interval"]]) for row in run.rows
            if isinstance(row.get("loss_by_interval"), list) and row["loss_by_interval"]]  # fmt: skip
    if not rows:
        return page.missing("loss_by_interval in metrics.jsonl (no loss by timestep)")
    last = [interval for _, interval in rows[-max(1, len(rows) // 4) :]]
    means = [_mean_known([row[place] for row in last]) for place in range(len(last[0]))]
    return page.figure(
        charts.intervals([step for step, _ in rows], [losses for _, losses in rows], DEFAULT_TIMESTEPS),
        "Loss by timestep interval over the steps; blank where no sample fell into an interval.",
    ) + page.figure(charts.interval_bars(means, DEFAULT_TIMESTEPS), f"The same, mean of the last {len(last)} steps.")


def _packing(run: RunFolder) -> str:
    fills, balances = run.values("pack_fill"), run.values("balance")
    if not fills and not balances:
        return page.missing("pack_fill and balance in metrics.jsonl")
    curves = [Line(name, run.column(key), color) for name, key, color in
              (("pack fill", "pack_fill", BLUE), ("balance", "balance", ORANGE)) if run.values(key)]  # fmt: skip
    means = [f"{name} {fmean(values):.4f}" for name, values in (("fill", fills), ("balance", balances)) if values]
    return page.figure(
        charts.lines(run.steps, curves, "ratio", height=2.6),
        "Fill: tokens of samples / tokens of packs. Balance: cost of the heaviest pack / mean cost of the step's packs "
        f"(1 is perfect). Means: {', '.join(means)}.",
    )


def _optimizer(run: RunFolder) -> str:
    drawn = [
        charts.lines(run.steps, [Line(key, run.column(key), color)], label, height=2.2, smooth=key != "lr")
        for key, label, color in (("grad_norm", "gradient norm", PURPLE), ("lr", "learning rate", GREEN))
        if run.values(key)
    ]
    return page.figure("".join(drawn), "Norm of the gradient before clipping; learning rate.") if drawn else ""


def vae_section(run: RunFolder) -> str:
    """Return PSNR, loss terms and reconstructions of a VAE training."""
    title, parts = f"VAE: {run.folder.name}", [page.missing(problem) for problem in run.problems]
    if run.values("psnr"):
        best = max(run.values("psnr"))
        measured = [Line(name, run.column(key), color) for name, key, color in (
            ("PSNR", "psnr", GREEN), ("PSNR of averaged weights", "psnr_ema", PURPLE)
        ) if run.values(key)]  # fmt: skip
        chart = charts.lines(run.steps, measured, "PSNR (dB)", smooth=False, height=2.8)
        parts.append(page.figure(chart, f"Reconstruction of clips that are not trained on; best {best:.2f} dB."))
    elif run.rows:
        parts.append(page.missing("psnr in metrics.jsonl (nothing was held out, or not measured yet)"))
    terms = [Line(name, run.column(key), color) for name, key, color in (
        ("L1", "l1", BLUE), ("perceptual (random net)", "perceptual_random_net", ORANGE),
        ("LPIPS", "lpips", ORANGE), ("KL", "kl", PURPLE),
    ) if any(value > 0 for value in run.values(key))]  # fmt: skip
    if terms:
        parts.append(
            page.figure(charts.lines(run.steps, terms, "loss term", logarithmic=True), "Terms of the loss, unweighted.")
        )
    if run.values("discriminator"):
        logits = [Line(name, run.column(key), color) for name, key, color in (
            ("discriminator's loss", "discriminator", BLUE), ("logits of clips", "logits_real", GREEN),
            ("logits of reconstructions", "logits_fake", ORANGE),
        )]  # fmt: skip
        parts.append(page.figure(charts.lines(run.steps, logits, "discriminator"), "Hinge loss and mean logits."))
    pictures = sorted((run.folder / "reconstructions").glob("*.png"))
    parts += [
        page.figure(page.image(path, path.stem), f"{path.stem}: above the original, below its reconstruction.")
        for path in pictures
    ]
    if not pictures:
        parts.append(page.missing(f"{run.folder / 'reconstructions'} holds no picture."))
    return page.section(title, *parts)


def dataset_section(folder: Path) -> str:
    """Return what the indexed dataset holds, by shape."""
    try:
        dataset = IndexedDataset(folder, verify="never")
    except DataError as error:
        return page.section("Dataset", page.missing(str(error)))
    encoder, sizes = dataset.encoder, (dataset.frames, dataset.height, dataset.width)
    shapes = Counter(zip(*(axis.tolist() for axis in sizes), strict=True))
    rows = [(f"{t} x {h} x {w}", count, count / max(shapes.values())) for (t, h, w), count in shapes.most_common()]
    facts = (
        f"{len(dataset)} samples in {len(dataset.manifest.shards)} shard(s). Texts are {encoder.text_kind}, at most "
        f"{encoder.text_length} tokens of width {encoder.text_width}; latents have {encoder.latent_channels} channels "
        f"and are multiplied by {encoder.latent_scale_factor:.4g}."
    )
    shown = page.table(("latents (T x H x W)", "samples"), rows, numbers=(1,), bar=True)
    return page.section("Dataset", page.paragraph(facts), shown)


def steps_section(steps: dict[str, Row] | None, path: Path) -> str:
    """Return how long each command took."""
    if not steps:
        return page.section("Timings", page.missing(f"{path} holds no command with its seconds."))
    longest = max(step["seconds"] for step in steps.values())
    rows = [(name, duration(step["seconds"]), step["seconds"] / longest) for name, step in steps.items()]
    rows.append(("together", duration(sum(step["seconds"] for step in steps.values())), 0.0))
    commands = "\n\n".join(f"# {name}\n{_command(step.get('command'))}" for name, step in steps.items())
    return page.section(
        "Timings", page.table(("command", "time"), rows, numbers=(1,), bar=True), page.details("The commands", commands)
    )


def config_section(runs: Sequence[RunFolder]) -> str:
    """Return the resolved configs, to be opened."""
    shown = [page.details(str(run.folder.name), run.config) for run in runs if run.config is not None]
    return page.section("Resolved configs", *shown) if shown else ""


def duration(seconds: float) -> str:
    """Return seconds as text: "12.3 s", "4 min 05 s"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _command(words: object) -> str:
    """Return a command as a line; the interpreter's path is nobody's business."""
    if not isinstance(words, list) or not words:
        return "(not recorded)"
    first = "python" if Path(str(words[0])).name.startswith("python") else str(words[0])
    return " ".join([first, *(str(word) for word in words[1:])])
