"""The verb `estimate`: print what a config costs; needs neither a GPU nor, with `--clip`, the dataset."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from megacogvx.config import load_config
from megacogvx.errors import ConfigError
from megacogvx.parallel.config import ParallelConfig
from megacogvx.training.config import TrainConfig
from megacogvx.training.estimate.communication import sent_by_term
from megacogvx.training.estimate.machine import MACHINES, GiB, Machine, machine
from megacogvx.training.estimate.memory import Ops
from megacogvx.training.estimate.parameters import PARTS, count_parameters
from megacogvx.training.estimate.prediction import FILL, RESERVE, Prediction, predict
from megacogvx.training.estimate.suggest import suggest
from megacogvx.training.estimate.workload import Workload, parse_clip, workload

EXAMPLE = """example:
  megacogvx estimate examples/configs/cogvideox_5b_stage2.yaml --gpus 256 --gpu h100-80 --suggest"""
SHOWN = 10  # suggestions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("config", type=Path, help="YAML file of a training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the whole run")
    parser.add_argument("--gpu", default="h100-80", choices=list(MACHINES), help="which (default: %(default)s)")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node (default: %(default)s)")
    parser.add_argument("--clip", metavar="FRAMESxHEIGHTxWIDTH", help="full packs of such clips, not the dataset's")
    parser.add_argument("--ops", default="fused", choices=get_args(Ops), help="ops that compute (default: %(default)s)")
    parser.add_argument("--matrix-tflops", type=float, help="measured rate of matrix products, of one GPU")
    parser.add_argument("--attention-tflops", type=float, help="measured rate of attention, of one GPU")
    parser.add_argument("--suggest", action="store_true", help="rank all layouts that fit")


def run(arguments: argparse.Namespace) -> None:
    """Print the estimate.

    Raises:
        ConfigError: the config is wrong, or the layout can't be built on so few GPUs.
    """
    if arguments.gpus < 1:
        raise ConfigError(f"--gpus={arguments.gpus} must be at least 1")
    config = load_config(TrainConfig, arguments.config, arguments.overrides)
    work = workload(config, parse_clip(arguments.clip) if arguments.clip else None)
    gpu = machine(
        arguments.gpu, node=arguments.node, matrix_tflops=arguments.matrix_tflops,
        attention_tflops=arguments.attention_tflops,
    )  # fmt: skip
    console = Console(width=120)
    size = bytes_per_weight(config)
    _print_work(console, config, work)
    if arguments.suggest:
        _print_suggestions(console, config, suggest(config, work, gpu, arguments.gpus, arguments.ops, size), gpu)
        return
    _print_layout(console, config, predict(config, work, gpu, arguments.gpus, arguments.ops, size), gpu, arguments.gpus)
    _print_assumptions(console, work, gpu, arguments.ops, config.parallel.overlap_grad_reduce)


def bytes_per_weight(config: TrainConfig) -> int:
    """Return the bytes of a weight on a GPU."""
    return 4 if config.training.precision == "fp32" else 2


def layout_text(parallel: ParallelConfig, replicas: int) -> str:
    """Return a layout in short: "tp1 cp4 pp1 dp64 keep_attention"."""
    ring = f" ring{parallel.ring_size}" if parallel.ring_size > 1 else ""
    return (
        f"tp{parallel.tensor_parallel_size} cp{parallel.context_parallel_size}{ring} "
        f"pp{parallel.pipeline_parallel_size} dp{replicas} {parallel.recompute}"
    )


def _print_work(console: Console, config: TrainConfig, work: Workload) -> None:
    counts = count_parameters(config.model)
    parts = ", ".join(f"{part} {counts[part] / 1e6:,.1f} M" for part in PARTS)
    tokens = work.packs * config.data.tokens_per_pack
    console.print(f"parameters   {sum(counts.values()):,} ({parts})")
    console.print(
        f"pack         {config.data.tokens_per_pack:,} tokens: {work.samples_per_pack:.2f} samples of "
        f"{work.tokens_per_sample:,.0f} tokens, {work.used_tokens_per_pack / config.data.tokens_per_pack:.1%} full"
    )
    console.print(
        f"step         {work.packs} packs, {tokens:,} tokens, about {work.packs * work.samples_per_pack:,.0f} samples"
    )


def _print_layout(console: Console, config: TrainConfig, found: Prediction, gpu: Machine, gpus: int) -> None:
    console.print(f"layout       {layout_text(found.parallel, found.replicas)} on {gpus} x {gpu.name}")
    console.print(f"rules        {found.broken or 'everything divides'}")
    console.print(_memory_table(found, gpu), _traffic_table(found), _seconds_table(found))
    steps = config.training.steps
    hours = found.step_seconds * steps / 3600
    console.print(
        f"utilisation  {found.mfu:.1%} of {gpu.peak / 1e12:.0f} TFLOP/s; "
        f"{found.packs * config.data.tokens_per_pack / found.step_seconds / gpus:,.0f} tokens/s on each GPU"
    )
    console.print(f"whole stage  {steps:,} steps: {hours / 24:,.1f} days, {hours * gpus:,.0f} GPU-hours")


def _memory_table(found: Prediction, gpu: Machine) -> Table:
    fits = "fits" if found.fits(gpu) else f"does NOT fit within {FILL:.0%}"
    table = Table(
        "part", "GiB", min_width=64, title=f"memory of the fullest rank: {fits} of {gpu.memory / GiB:.1f} GiB"
    )
    for name, value in vars(found.memory).items():
        table.add_row(name.replace("_", " "), f"{value / GiB:.2f}")
    table.add_row("all", f"{found.memory.total / GiB:.2f}")
    return table


def _traffic_table(found: Prediction) -> Table:
    table = Table("for", "between", "MB", title="sent by one rank in a step")
    for (term, axis), sent in sorted(sent_by_term(found.traffic).items(), key=lambda entry: -entry[1]):
        table.add_row(term, axis.replace("_", " x "), f"{sent / 1e6:,.3f}")
    return table


def _seconds_table(found: Prediction) -> Table:
    table = Table("cause", "seconds", title="one step")
    for name, value in found.seconds.items():
        table.add_row(name, f"{value:.3f}")
    table.add_row("all", f"{found.step_seconds:.3f}")
    return table


def _print_suggestions(console: Console, config: TrainConfig, found: list[Prediction], gpu: Machine) -> None:
    if not found:
        console.print(
            f"no layout fits {FILL:.0%} of {gpu.memory / GiB:.1f} GiB and divides; try more GPUs or larger ones"
        )
        return
    table = Table(
        "layout", "packs", "GiB", "s/step", "MFU", "overrides", title=f"{len(found)} layouts fit; the fastest"
    )
    for entry in found[:SHOWN]:
        table.add_row(
            layout_text(entry.parallel, entry.replicas), str(entry.packs), f"{entry.memory.total / GiB:.1f}",
            f"{entry.step_seconds:.2f}", f"{entry.mfu:.1%}", overrides(config, entry),
        )  # fmt: skip
    console.print(table)


def overrides(config: TrainConfig, found: Prediction) -> str:
    """Return the overrides that turn `config` into this layout."""
    pairs = [
        f"parallel.{name}={getattr(found.parallel, name)}"
        for name in (
            "tensor_parallel_size",
            "context_parallel_size",
            "ring_size",
            "pipeline_parallel_size",
            "recompute",
        )
        if getattr(found.parallel, name) != getattr(config.parallel, name)
    ]
    if config.data.samples_per_step is not None:
        pairs += ["data.samples_per_step=null", f"data.packs_per_step={found.packs}"]
    return " ".join(pairs)


def _print_assumptions(console: Console, work: Workload, gpu: Machine, ops: Ops, overlap: bool) -> None:
    sent = "of all that is sent only gradients overlap" if overlap else "communication doesn't overlap"
    console.print(
        f"assumed      {work.source}; {ops} ops; matrix products reach {gpu.peak * gpu.matrix_share / 1e12:.0f} and "
        f"attention {gpu.peak * gpu.attention_share / 1e12:.0f} TFLOP/s, memory {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{gpu.inside / 1e9:.0f} GB/s to GPUs of the node ({gpu.node}), {gpu.between / 1e9:.0f} GB/s beyond; "
        f"{sent}; {RESERVE / 1e9:.0f} GB are no tensors; the costliest pack sets the pace. "
        "None of this is measured here: compare with metrics.jsonl of a short run."
    )
