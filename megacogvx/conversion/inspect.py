"""The verb `inspect`: what is in a checkpoint of any format, tensor by tensor, or how two checkpoints differ.

A file is shown under its own names, whether or not it is a model that we know. Two checkpoints of different formats are
compared under our names.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megacogvx.conversion import diffusers, megacogvx, sat
from megacogvx.conversion.convert import FORMATS, open_parts
from megacogvx.conversion.part import KINDS, LIVE, ReadOptions
from megacogvx.conversion.pickled_files import PickledFile
from megacogvx.conversion.safetensors_files import SafetensorsFiles, raw_bytes
from megacogvx.conversion.tensors import TensorSource
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.log import get_logger, progress

EXAMPLE = """\
example:
  megacogvx inspect CogVideoX-5b
  megacogvx inspect mp_rank_00_model_states.pt --only '*adaln*'
  megacogvx inspect runs/5b --against CogVideoX-5b
"""

FILE = "file"  # in place of a model's kind
logger = get_logger(__name__)


@dataclass(frozen=True)
class Summary:
    """One tensor: what it is, and what its elements are like.

    Attributes:
        dtype, shape: as stored.
        minimum, maximum, mean, deviation: of the finite elements.
        zeros, nans, infinities: how many elements are such.
        xxh3: hex digest of the bytes (64 bits).
    """

    dtype: str
    shape: tuple[int, ...]
    minimum: float
    maximum: float
    mean: float
    deviation: float
    zeros: int
    nans: int
    infinities: int
    xxh3: str


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints: `relative` is ||a - b|| / ||b||, `largest` max|a - b|, `differing` elements."""

    relative: float
    largest: float
    differing: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`."""
    add = parser.add_argument
    add("path", type=Path, help="a checkpoint of any format: folder, .pt or .safetensors file")
    add("--against", type=Path, help="another one: show how this one differs from it")
    add("--only", default="*", metavar="PATTERN", help="names to show, such as '*norm*' (default: all)")
    add("--weights", default=LIVE, help="which set of weights, such as ema (default: live)")
    add("--json", type=Path, help="write everything into this file as well")


def run(arguments: argparse.Namespace) -> None:
    """Print one line for each tensor, and a summary.

    Raises:
        CheckpointError: a file can't be read, or holds no tensors.
        ConfigError: the pattern fits no name.
    """
    if arguments.against is None:
        found: Mapping[str, Any] = summaries(raw_sources(arguments.path, arguments.weights), arguments.only)
        lines = summary_lines(found)
    else:
        pair = comparable(arguments.path, arguments.against, arguments.weights)
        found = differences(*pair, arguments.only)
        lines = difference_lines(found)
    print("\n".join(lines))
    if arguments.json:
        content = {name: value if isinstance(value, str) else asdict(value) for name, value in found.items()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def raw_sources(path: Path, weights: str = LIVE) -> dict[str, TensorSource]:
    """Return the tensors of every model that `path` holds, under their own names; the key is put before them.

    Raises:
        CheckpointError: `path` isn't there, or is of no known format.
    """
    return _prefixed(_models(path, weights))


def summaries(sources: Mapping[str, TensorSource], only: str = "*") -> dict[str, Summary]:
    """Return the summary of every tensor whose name fits the pattern.

    Raises:
        ConfigError: none does.
    """
    chosen = _chosen(sources, only)
    return {full: summary(source.read(name)) for full, source, name in progress(chosen, "inspect", len(chosen))}


def summary(tensor: torch.Tensor) -> Summary:
    """Return what one tensor is like."""
    digest = xxhash.xxh3_64_hexdigest(raw_bytes(tensor.contiguous()))
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    values = tensor.reshape(-1)
    finite = values if not values.dtype.is_floating_point else values[values.isfinite()]
    nans = int(values.isnan().sum()) if values.dtype.is_floating_point else 0
    low = high = mean = deviation = math.nan
    if finite.numel():
        # Sums in fp64, whose accumulator doesn't need the elements as fp64.
        mean = float(finite.sum(dtype=torch.float64)) / finite.numel()
        square = float(torch.linalg.vector_norm(finite.float() - mean, dtype=torch.float64)) ** 2
        low, high, deviation = float(finite.min()), float(finite.max()), math.sqrt(square / finite.numel())
    zeros = int((values == 0).sum())
    infinities = values.numel() - finite.numel() - nans
    return Summary(dtype, shape, low, high, mean, deviation, zeros, nans, infinities, digest)


def comparable(path: Path, other: Path, weights: str = LIVE) -> tuple[dict[str, TensorSource], dict[str, TensorSource]]:
    """Return the tensors of two checkpoints under the same kind of names; a model that one of them lacks is left out.

    Raises:
        CheckpointError: one can't be read, they hold no model of one kind, or their formats differ and one of them
            isn't a complete model.
    """
    if _format(path) == _format(other):
        first, second = _models(path, weights), _models(other)
    else:
        first, second = _in_our_names(path, weights), _in_our_names(other)
    if len(first) == len(second) == 1 and FILE in (*first, *second):
        return {"": first.popitem()[1]}, {"": second.popitem()[1]}
    both = [kind for kind in first if kind in second]
    if not both:
        raise CheckpointError(
            f"{path} holds {' and '.join(first)}, {other} holds {' and '.join(second)}: they have no model of one kind"
        )
    if alone := sorted(first.keys() ^ second.keys()):
        logger.info("only one of them holds a %s, which is left out", " and a ".join(alone))
    return _prefixed({kind: first[kind] for kind in both}), _prefixed({kind: second[kind] for kind in both})


def differences(
    sources: Mapping[str, TensorSource], others: Mapping[str, TensorSource], only: str = "*"
) -> dict[str, Difference | str]:
    """Compare two checkpoints.

    Returns:
        name to the difference, or to a sentence where there is nothing to compare: the tensor is in one of them only,
        or its shape differs.
    """
    second = {full: (source, name) for full, source, name in _all(others)}
    found: dict[str, Difference | str] = {}
    chosen = _chosen(sources, only)
    for full, source, name in progress(chosen, "compare", len(chosen)):
        if full not in second:
            found[full] = "only in the first"
            continue
        other, other_name = second.pop(full)
        ours, theirs = source.infos[name], other.infos[other_name]
        if ours.shape != theirs.shape:
            found[full] = f"{ours.shape} in the first, {theirs.shape} in the second"
        else:
            found[full] = difference(source.read(name), other.read(other_name))
    return found | {full: "only in the second" for full in second if fnmatch.fnmatch(full, only)}


def difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Return how `a` differs from `b`; NaN in both counts as equal."""
    places = (a != b) & ~(a.isnan() & b.isnan())
    if not places.any():
        return Difference(0.0, 0.0, 0)
    gap = a[places].float() - b[places].float()
    norm = float(torch.linalg.vector_norm(b.float().nan_to_num()))
    size = float(torch.linalg.vector_norm(gap))
    return Difference(size / norm if norm else math.inf, float(gap.abs().max()), int(places.sum()))


def summary_lines(found: Mapping[str, Summary]) -> list[str]:
    """Return a table, and what all tensors are together."""
    width = max(map(len, found))
    lines = [
        f"{name:<{width}}  {s.dtype:<8} {_shape(s.shape):<18} {s.xxh3}  [{s.minimum:10.4g}, {s.maximum:10.4g}] "
        f"mean {s.mean:11.4g} std {s.deviation:10.4g}"
        + "".join(f"  {count} {what}" for count, what in ((s.nans, "NaN"), (s.infinities, "Inf")) if count)
        for name, s in found.items()
    ]
    elements = sum(math.prod(s.shape) for s in found.values())
    dtypes = ", ".join(sorted({s.dtype for s in found.values()}))
    broken = [name for name, s in found.items() if s.nans or s.infinities]
    lines.append(f"{len(found)} tensors, {elements:,} elements, {dtypes}; {len(broken)} tensors with NaN or Inf")
    return lines


def difference_lines(found: Mapping[str, Difference | str]) -> list[str]:
    """Return a line for each tensor that differs, and how many don't."""
    width = max(map(len, found))
    equal = [name for name, d in found.items() if isinstance(d, Difference) and not d.differing]
    lines = []
    for name, d in found.items():
        if isinstance(d, str):
            lines.append(f"{name:<{width}}  {d}")
        elif d.differing:
            facts = f"relative {d.relative:.3g}, largest {d.largest:.3g}, {d.differing:,} elements"
            lines.append(f"{name:<{width}}  {facts}")
    return [*lines, f"{len(equal)} of {len(found)} tensors are equal"]


def _raw(name: str, found: Path, weights: str) -> TensorSource:
    if name == sat.NAME:
        file = found if found.suffix == ".pt" else sat.states_file(found, weights)
        return PickledFile(file, "module", "state_dict", "")
    if name == diffusers.NAME:
        return SafetensorsFiles(found)
    return megacogvx.CheckpointTensors(megacogvx.find_checkpoint(found).path, weights)


def _format(path: Path) -> str:
    if path.is_file():
        return sat.NAME if path.suffix == ".pt" else diffusers.NAME
    return next((module.NAME for module in FORMATS.values() if module.find(path)), "")


def _in_our_names(path: Path, weights: str = LIVE) -> dict[str, TensorSource]:
    parts = open_parts([path], ReadOptions(weights=weights, drop_foreign=True))
    return {kind: part.tensors for kind, part in parts.items()}


def _models(path: Path, weights: str = LIVE) -> dict[str, TensorSource]:
    """Return the tensors of every model by its kind; those of a file that may be anything by `FILE`."""
    if path.suffix == ".pt":
        return {FILE: PickledFile(path, "module", "state_dict", "")}
    if path.suffix in (".safetensors", ".json") and path.is_file():
        return {FILE: SafetensorsFiles(path)}
    for module in FORMATS.values():
        if found := module.find(path):
            return {kind: _raw(module.NAME, found[kind], weights) for kind in KINDS if kind in found}
    if path.is_dir() and any(path.glob("*.safetensors*")):
        return {FILE: SafetensorsFiles(path)}
    raise CheckpointError(f"{path} does not exist, or is no checkpoint that is known here")


def _prefixed(models: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    return {f"{kind}/" if len(models) > 1 else "": source for kind, source in models.items()}


def _all(sources: Mapping[str, TensorSource]) -> Iterator[tuple[str, TensorSource, str]]:
    for prefix, source in sources.items():
        for name in source.infos:
            yield prefix + name, source, name


def _chosen(sources: Mapping[str, TensorSource], only: str) -> list[tuple[str, TensorSource, str]]:
    everything = list(_all(sources))
    if not everything:
        paths = ", ".join(str(source.path) for source in sources.values())
        raise CheckpointError(f"{paths} holds no tensors")
    chosen = [entry for entry in everything if fnmatch.fnmatch(entry[0], only)]
    if not chosen:
        raise ConfigError(f"--only {only!r} fits none of {len(everything)} names; one of them is {everything[0][0]}")
    return chosen


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
