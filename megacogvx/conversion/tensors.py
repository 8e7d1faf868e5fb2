"""Named tensors that are read one at a time, and tables that translate between two sets of names and layouts.

A table is a list of `Group`s: some tensors of one format that together hold the same numbers as some of ours. Both
directions are plain views and copies, so translating there and back gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from megacogvx.errors import CheckpointError

Tensors = list[torch.Tensor]
NAMES_SHOWN = 5  # of each kind, in an error


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors on disk (or made from such): all names at once, the numbers one tensor at a time."""

    @property
    def path(self) -> Path:
        """Where they come from, for messages."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every name, in the order of the file."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, contiguous, on the CPU; the caller owns it."""


class InMemory:
    """A state dict as a source."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], path: Path = Path("memory")) -> None:
        self.path, self._tensors = path, tensors
        self.infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of one tensor."""
        return self._tensors[name].detach().clone().contiguous()


@dataclass(frozen=True)
class Group:
    """Tensors of another format that hold the same numbers as tensors of ours.

    Attributes:
        ours: `{name: shape}` of ours.
        theirs: names in the other format.
        to_theirs, to_ours: ours to theirs and back, in the order of the names; only reshapes, cuts and joins.
        accepted: another shape in which the (only) tensor of theirs may be found, with its elements in the same order.
    """

    ours: Mapping[str, tuple[int, ...]]
    theirs: tuple[str, ...]
    to_theirs: Callable[[Tensors], Tensors]
    to_ours: Callable[[Tensors], Tensors]
    accepted: tuple[int, ...] | None = None

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes that follow from ours."""
        made = self.to_theirs([torch.empty(shape, device="meta") for shape in self.ours.values()])
        return {name: tuple(tensor.shape) for name, tensor in zip(self.theirs, made, strict=True)}


Table = Sequence[Group]


def renamed(ours: str, theirs: str, shape: tuple[int, ...], their_shape: tuple[int, ...] | None = None) -> Group:
    """Return the group of one tensor under two names.

    Args:
        ours, theirs: its names.
        shape: of ours.
        their_shape: of theirs, if it differs; the order of elements is equal, and our shape is accepted as well.
    """
    wanted = shape if their_shape is None else their_shape
    return Group(
        {ours: shape},
        (theirs,),
        lambda tensors: [tensors[0].reshape(wanted)],
        lambda tensors: [tensors[0].reshape(shape)],
        accepted=shape,
    )


class Translated:
    """A source in another format's names as a source in ours."""

    def __init__(self, source: TensorSource, table: Table) -> None:
        """Take a source that `check_complete` found complete."""
        self.path = source.path
        self._source = source
        self._groups = {name: group for group in table for name in group.ours}
        self.infos = {
            name: TensorInfo(group.ours[name], source.infos[group.theirs[0]].dtype)
            for name, group in self._groups.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one of our tensors; a tensor of theirs that holds several of ours is read again for each."""
        group = self._groups[name]
        tensors = [self._source.read(theirs) for theirs in group.theirs]
        return group.to_ours(tensors)[list(group.ours).index(name)].contiguous()


def translate(source: TensorSource, table: Table) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of another format, (name, tensor), out of a source in our names, in the order of the table."""
    for group in table:
        tensors = group.to_theirs([source.read(name) for name in group.ours])
        for name, tensor in zip(group.theirs, tensors, strict=True):
            yield name, tensor.contiguous()


def translated_infos(source: TensorSource, table: Table) -> dict[str, TensorInfo]:
    """Return what `translate` will yield, in its order."""
    return {
        name: TensorInfo(shape, source.infos[next(iter(group.ours))].dtype)
        for group in table
        for name, shape in group.their_shapes().items()
    }


def check_complete(source: TensorSource, table: Table, what: str) -> None:
    """Check that a source holds exactly the tensors of a table, in their shapes and one dtype per group.

    Args:
        source: in the other format's names.
        table: of the model that it should hold.
        what: names the model, for the message.

    Raises:
        CheckpointError: tensors are missing, left over, or of another shape; all kinds are counted and named.
    """
    expected = {name: shape for group in table for name, shape in group.their_shapes().items()}
    infos = source.infos
    missing = [name for name in expected if name not in infos]
    left_over = [name for name in infos if name not in expected]
    accepted = {group.theirs[0]: group.accepted for group in table}
    differing = [
        f"{name} is {infos[name].shape}, not {shape}"
        for name, shape in expected.items()
        if name in infos and infos[name].shape not in (shape, accepted.get(name))
    ]
    problems = [
        f"{len(names)} {kind}: {shortened(names)}"
        for names, kind in ((missing, "missing"), (left_over, "left over"), (differing, "of another shape"))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source.path} does not hold {what} ({len(expected)} tensors): {'; '.join(problems)}; is it another "
            "variant, or are its settings of another model?"
        )
    for group in table:
        dtypes = {str(infos[name].dtype) for name in group.theirs}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{source.path} holds {', '.join(group.theirs)} in different dtypes ({', '.join(sorted(dtypes))}), "
                "though they are one tensor elsewhere; convert it to one dtype first"
            )


def shortened(names: Iterable[str]) -> str:
    """Return the first names, and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
