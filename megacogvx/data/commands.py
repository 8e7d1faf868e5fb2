"""`megacogvx data`: look into datasets (`info`) and check them (`verify`); what writes is in `dataset_commands.py`."""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from megacogvx.data import dataset_commands
from megacogvx.data.indexed.reader import IndexedDataset
from megacogvx.data.indexed.remote import Folder, folder_at
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.errors import DataError

EXAMPLE = """example:
  megacogvx data info datasets/stage1
  megacogvx data verify datasets/stage1 datasets/stage2
  megacogvx data column datasets/stage1 --name flow --from-metadata flow_score
  megacogvx data filter datasets/stage1 --where "flow>=0.5" --output datasets/moving
  megacogvx data split datasets/stage1 --parts datasets/train=0.98 datasets/held-out=0.02
  megacogvx data import latents/ --encoder datasets/stage1 --axes cthw --output datasets/imported
"""
SHOWN_SIZES = 12  # latent sizes that `info` lists
SHOWN_PROBLEMS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `megacogvx data`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    for name, text in (
        ("info", "show what a dataset holds, from its indexes alone"),
        ("verify", "read every byte of a dataset and compare all checksums"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument(
            "folders", nargs="+", type=folder_at, metavar="FOLDER", help="or URL; holds a manifest.json"
        )
    dataset_commands.add_commands(commands)


def run(arguments: argparse.Namespace) -> None:
    """Run the chosen subcommand.

    Raises:
        ConfigError: an option doesn't make sense.
        DataError: a dataset can't be opened or written, or `verify` found problems.
    """
    console = Console()
    if arguments.data_command == "info":
        for folder in arguments.folders:
            _info(folder, console)
    elif arguments.data_command == "verify":
        broken = [str(folder) for folder in arguments.folders if not _verify(folder, console)]
        if broken:
            raise DataError(f"damaged: {', '.join(broken)}; restore the named files, or write their shards again")
    else:
        arguments.run_command(arguments)


def _info(folder: Folder, console: Console) -> None:
    dataset = IndexedDataset(folder)
    for table in (_facts(dataset), _shards(dataset), _sizes(dataset)):
        console.print(table)


def _facts(dataset: IndexedDataset) -> Table:
    encoder = dataset.encoder
    table = _table(str(dataset.folder), "", "")
    rows = {
        "generation": dataset.manifest.generation,
        "checksum": f"{dataset.manifest.checksum:016x}",
        "samples": f"{len(dataset):,}",
        "size": _size(sum(shard.bin_bytes + shard.idx_bytes for shard in dataset.manifest.shards)),
        "latents": f"{encoder.latent_dtype}, {encoder.latent_channels} channels, scale factor "
        f"{encoder.latent_scale_factor:g}",
        "text": f"{encoder.text_kind}, up to {encoder.text_length} tokens of width {encoder.text_width}",
        "text dtype": encoder.text_dtype,
        "first frames": f"{int(dataset.has_first_frame().sum()):,} samples",
        "text shared": _size(_shared_text_bytes(dataset)) + " saved by storing equal captions once",
        "VAE": encoder.vae_fingerprint,
        "text encoder": encoder.text_encoder_fingerprint,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _shards(dataset: IndexedDataset) -> Table:
    table = _table("Shards", "name", "samples", "size", "uuid")
    for entry in dataset.manifest.shards[:SHOWN_SIZES]:
        table.add_row(entry.name, f"{entry.samples:,}", _size(entry.bin_bytes + entry.idx_bytes), entry.uuid[:8])
    if len(dataset.manifest.shards) > SHOWN_SIZES:
        table.add_row(f"and {len(dataset.manifest.shards) - SHOWN_SIZES} more", "", "", "")
    return table


def _sizes(dataset: IndexedDataset) -> Table:
    sizes = Counter(zip(dataset.frames.tolist(), dataset.height.tolist(), dataset.width.tolist(), strict=True))
    table = _table("Latent sizes", "T x h x w", "samples", "share")
    for (frames, height, width), count in sizes.most_common(SHOWN_SIZES):
        table.add_row(f"{frames} x {height} x {width}", f"{count:,}", f"{count / len(dataset):.1%}")
    if len(sizes) > SHOWN_SIZES:
        rest = sum(count for _, count in sizes.most_common()[SHOWN_SIZES:])
        table.add_row(f"{len(sizes) - SHOWN_SIZES} more sizes", f"{rest:,}", f"{rest / len(dataset):.1%}")
    return table


def _verify(folder: Folder, console: Console) -> bool:
    report = verify_dataset(folder)
    table = _table(f"{folder}: {'damaged' if report.problems else 'sound'}", "", "")
    table.add_row("read", f"{report.samples:,} samples in {report.shards} shards, {_size(report.bytes)}")
    table.add_row("problems", str(len(report.problems)))
    for problem in report.problems[:SHOWN_PROBLEMS]:
        table.add_row("", problem)
    if len(report.problems) > SHOWN_PROBLEMS:
        table.add_row("", f"and {len(report.problems) - SHOWN_PROBLEMS} more")
    for note in report.notes:
        table.add_row("note", note)
    console.print(table)
    return not report.problems


def _shared_text_bytes(dataset: IndexedDataset) -> int:
    """Bytes of text that records share with an earlier one."""
    saved = 0
    for shard in dataset.shards:
        columns = shard.index.columns
        _, first = np.unique(columns["text_offset"], return_index=True)
        lengths = columns["text_length"].astype(np.int64)
        saved += int(lengths.sum() - lengths[first].sum()) * dataset.encoder.text_token_bytes
    return saved


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 or not column else "right", overflow="fold")
    return table


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
