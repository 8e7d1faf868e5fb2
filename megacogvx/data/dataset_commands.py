"""The subcommands of `megacogvx data` that write: merge, split, filter, recover, column, import and export."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megacogvx.data.exchange.exporters import export_folder, export_tars
from megacogvx.data.exchange.importers import ImportedSample, import_samples, read_folder, read_tar
from megacogvx.data.exchange.megatron import read_megatron
from megacogvx.data.indexed.encoder_info import EncoderInfo, parse_encoder
from megacogvx.data.indexed.layout import load_json
from megacogvx.data.indexed.manifest import MANIFEST, finish_dataset, read_manifest
from megacogvx.data.indexed.reader import IndexedDataset
from megacogvx.data.indexed.recover import recover_shard
from megacogvx.data.indexed.rewrite import SAMPLES_PER_SHARD, copy_samples, merge_datasets, split_shares
from megacogvx.data.indexed.shard import Shard
from megacogvx.data.indexed.side_columns import write_side_column
from megacogvx.data.indexed.writer import shard_name
from megacogvx.errors import ConfigError, DataError
from megacogvx.log import get_logger

logger = get_logger(__name__)


def add_commands(commands: Any) -> None:
    """Add the subparsers to `commands`."""
    add = _subparser(commands, "merge", "make one dataset of several; their files are linked, not rewritten", merge)
    add("sources", nargs="+", type=Path, metavar="FOLDER", help="datasets of one encoder")
    add("--output", type=Path, required=True, help="folder of the new dataset")

    add = _subparser(commands, "split", "cut a dataset into parts by a hash of the sample id", split)
    add("source", type=Path, metavar="FOLDER")
    add("--parts", nargs="+", required=True, metavar="FOLDER=SHARE", help="such as train=0.98 held-out=0.02")
    add("--samples-per-shard", type=_positive, default=SAMPLES_PER_SHARD)

    add = _subparser(commands, "filter", "copy the samples that keep to bounds, or are listed", filter_)
    add("source", type=Path, metavar="FOLDER")
    add("--output", type=Path, required=True, help="folder of the new dataset")
    add(
        "--where",
        nargs="+",
        default=[],
        metavar="COLUMN>=NUMBER",
        help="side columns, or frames, height, width; <= too",
    )
    add("--ids", type=Path, help="a file of sample ids, one a line")
    add("--samples-per-shard", type=_positive, default=SAMPLES_PER_SHARD)

    add = _subparser(commands, "recover", "rebuild the lost index of shards from their .bin", recover)
    add("folder", type=Path, metavar="FOLDER")
    add("--shards", nargs="+", help="names (default: every .bin without a sound .idx)")
    add("--encoder", type=Path, help="dataset or JSON that tells the encoder, where FOLDER has no manifest")

    add = _subparser(commands, "column", "write a side column: a score per sample", column)
    add("folder", type=Path, metavar="FOLDER")
    add("--name", required=True, help="of the column")
    add("--from-metadata", metavar="KEY", help="take the number under this key of each record's metadata")
    add("--from-csv", type=Path, metavar="FILE", help="rows of sample id, score; other samples get none")
    add(
        "--rank", action="store_true", help="write each score's place among all, from 0 to 1: 0.8 begins the best fifth"
    )

    add = _subparser(commands, "import", "write a dataset of tensors in other formats", import_)
    add("sources", nargs="+", type=Path, help="folders of .pt or .safetensors, WebDataset .tar files, or one Megatron "
        "prefix of latents")  # fmt: skip
    add("--output", type=Path, required=True, help="folder of the new dataset")
    add("--encoder", type=Path, required=True, help="what made the tensors: a dataset to follow, or a JSON of its keys")
    add("--axes", choices=["thwc", "cthw", "tchw"], default="thwc", help="of the latents (default thwc)")
    add("--shard-mb", type=_positive, default=2048, help="megabytes of latents in a shard (default 2048)")
    add("--megatron-text", type=Path, metavar="PREFIX", help="the texts, where SOURCE is a Megatron prefix")
    add("--megatron-shapes", type=Path, metavar="JSONL", help='a line per sample: {"latents": [...], "text": [...]}')

    add = _subparser(commands, "export", "write a dataset as safetensors files, or as WebDataset tars of them", export)
    add("source", type=Path, metavar="FOLDER")
    add("--output", type=Path, required=True, help="new folder")
    add("--format", choices=["safetensors", "webdataset"], default="safetensors")
    add("--samples-per-tar", type=_positive, default=1000)


def merge(arguments: argparse.Namespace) -> None:
    """Run `megacogvx data merge`."""
    _log_written(arguments.output, sum(s.samples for s in merge_datasets(arguments.sources, arguments.output).shards))


def split(arguments: argparse.Namespace) -> None:
    """Run `megacogvx data split`."""
    dataset, parts = IndexedDataset(arguments.source), dict[Path, float]()
    for part in arguments.parts:
        folder, _, share = part.rpartition("=")
        try:
            parts[Path(folder)] = float(share)
        except ValueError:
            parts[Path(folder)] = math.nan
        if not folder or not 0 < parts[Path(folder)] < math.inf:
            raise ConfigError(f"--parts {part!r} must be FOLDER=SHARE with a positive share, such as held-out=0.02")
    for folder, numbers in zip(parts, split_shares(dataset.sample_id, list(parts.values())), strict=True):
        copy_samples(dataset, numbers, folder, arguments.samples_per_shard)
        _log_written(folder, len(numbers))


def filter_(arguments: argparse.Namespace) -> None:
    """Run `megacogvx data filter`."""
    dataset = IndexedDataset(arguments.source)
    kept = np.ones(len(dataset), bool)
    for condition in arguments.where:
        kept &= _holds(dataset, condition)
    if arguments.ids is not None:
        wanted = np.array([_id(line, arguments.ids) for line in _lines(arguments.ids)], np.uint64)
        unknown = np.setdiff1d(wanted, dataset.sample_id)
        if len(unknown):
            raise DataError(
                f"{arguments.ids} lists {len(unknown)} ids that {dataset.folder} lacks, such as {unknown[0]}"
            )
        kept &= np.isin(dataset.sample_id, wanted)
    copy_samples(dataset, np.flatnonzero(kept), arguments.output, arguments.samples_per_shard)
    _log_written(arguments.output, int(kept.sum()))


def recover(arguments: argparse.Namespace) -> None:
    """Run `megacogvx data recover`."""
    folder: Path = arguments.folder
    encoder = _encoder(arguments.encoder or folder)
    names = arguments.shards or [p.stem for p in sorted(folder.glob("*.bin")) if not _sound(folder, p.stem)]
    for name in names:
        report = recover_shard(folder, name, encoder)
        logger.info("%s: %d samples; lost: %s", report.path, report.samples, report.lost or "none")
    finish_dataset(folder)


def column(arguments: argparse.Namespace) -> None:
    """Run `megacogvx data column`."""
    if (arguments.from_metadata is None) == (arguments.from_csv is None):
        raise ConfigError("name one of --from-metadata and --from-csv")
    dataset = IndexedDataset(arguments.folder)
    if arguments.from_metadata:
        facts = (dataset.metadata(number).get(arguments.from_metadata) for number in range(len(dataset)))
        values = [float(fact) if isinstance(fact, (int, float)) else math.nan for fact in facts]
    else:
        given = dict(_scores(arguments.from_csv))
        unknown = given.keys() - set(dataset.sample_id.tolist())
        if unknown:
            raise DataError(f"{arguments.from_csv}: {dataset.folder} has no sample {min(unknown)}")
        values = [given.get(sample_id, math.nan) for sample_id in dataset.sample_id.tolist()]
    scores = ranks(np.array(values), dataset.sample_id) if arguments.rank else np.array(values)
    path = write_side_column(arguments.folder, arguments.name, scores, dataset.sample_id)
    logger.info("%s: %d of %d samples have a value", path, np.isfinite(values).sum(), len(values))


def ranks(scores: np.ndarray, sample_id: np.ndarray) -> np.ndarray:
    """Return each score's place among all scores, float64 `[n]` in [0, 1): the share that comes before it.

    Args:
        scores: `[n]`, NaN for none, which stays NaN.
        sample_id: uint64 `[n]`; equal scores are put in its order, so that exactly a fifth of them reach 0.8.
    """
    scored = np.flatnonzero(~np.isnan(scores))
    order = scored[np.lexsort((sample_id[scored], scores[scored]))]
    places = np.full(len(scores), np.nan)
    places[order] = np.arange(len(order)) / max(1, len(order))
    return places


def import_(arguments: argparse.Namespace) -> None:
    """Run `megacogvx data import`."""
    if (arguments.output / MANIFEST).exists():
        raise DataError(f"{arguments.output} is a dataset already; import into a new folder, then merge")
    names = import_samples(
        _imported(arguments), arguments.output, _encoder(arguments.encoder), axes=arguments.axes,
        shard_bytes=arguments.shard_mb << 20, name=shard_name,
    )  # fmt: skip
    manifest = finish_dataset(arguments.output, names)
    _log_written(arguments.output, sum(shard.samples for shard in manifest.shards))


def export(arguments: argparse.Namespace) -> None:
    """Run `megacogvx data export`."""
    dataset = IndexedDataset(arguments.source)
    if arguments.format == "safetensors":
        count = export_folder(dataset, arguments.output)
    else:
        count = export_tars(dataset, arguments.output, arguments.samples_per_tar)
    logger.info("%s: %d samples", arguments.output, count)


def _imported(arguments: argparse.Namespace) -> Iterator[ImportedSample]:
    if arguments.megatron_text or arguments.megatron_shapes:
        if not arguments.megatron_text or not arguments.megatron_shapes or len(arguments.sources) != 1:
            raise ConfigError("a Megatron prefix needs --megatron-text and --megatron-shapes, and is imported alone")
        return read_megatron(arguments.sources[0], arguments.megatron_text, arguments.megatron_shapes)
    readers = (read_tar(source) if source.is_file() else read_folder(source) for source in arguments.sources)
    return chain.from_iterable(readers)


def _encoder(path: Path) -> EncoderInfo:
    if path.is_dir():
        return read_manifest(path).encoder
    try:
        return parse_encoder(load_json(path.read_bytes(), str(path)), str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _holds(dataset: IndexedDataset, condition: str) -> np.ndarray:
    for sign in (">=", "<="):
        name, found, bound = condition.partition(sign)
        try:
            limit = float(bound)
        except ValueError:
            limit = math.nan
        if found and not math.isnan(limit):
            values = getattr(dataset, name) if name in ("frames", "height", "width") else dataset.side_column(name)
            return values >= limit if sign == ">=" else values <= limit
    raise ConfigError(f"--where {condition!r} must be COLUMN>=NUMBER or COLUMN<=NUMBER")


def _sound(folder: Path, name: str) -> bool:
    try:
        Shard(folder, name)
    except DataError:
        return False
    return True


def _scores(path: Path) -> Iterator[tuple[int, float]]:
    for number, row in enumerate(csv.reader(_lines(path)), start=1):
        try:
            yield int(row[0]), float(row[1])
        except (ValueError, IndexError):
            if number > 1:  # the first may be a heading
                raise DataError(f"{path}, row {number}: {row!r} is not a sample id and a number") from None


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as UTF-8 text: {error}") from None


def _id(line: str, path: Path) -> int:
    try:
        value = int(line)
    except ValueError:
        value = -1
    if not 0 <= value < 2**64:
        raise DataError(f"{path}: {json.dumps(line)} is not a sample id")
    return value


def _positive(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _log_written(folder: Path, samples: int) -> None:
    logger.info("%s: %d samples", folder, samples)


def _subparser(commands: Any, name: str, text: str, run: Any) -> Any:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run_command=run)
    return command.add_argument
