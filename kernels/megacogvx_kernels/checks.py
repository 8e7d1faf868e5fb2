"""Argument checks that the ops share: a wrong tensor is named before any implementation sees it."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

ALIGNMENT = 16  # bytes of one access of a kernel

# What was found out about tensors that every layer of a model is called with; asking a device again would stall it.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def require_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise unless `tensor` has the shape `expected` (None: any size).

    Raises:
        TypeError: it isn't a tensor.
        ValueError: the shape differs.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    fits = tensor.dim() == len(expected) and all(
        want in (None, size) for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; expected ({wanted})")


def require_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise `TypeError` unless `tensor` holds floating point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {tensor.dtype}")


def require_integer(name: str, tensor: torch.Tensor) -> None:
    """Raise `TypeError` unless `tensor` holds int32 or int64."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")


def require_one_device(**tensors: torch.Tensor) -> None:
    """Raise `ValueError` unless all tensors lie on the device of the first."""
    (first, leader), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != leader.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {leader.device}; they must be on one device")


def require_one_dtype(**tensors: torch.Tensor) -> None:
    """Raise `TypeError` unless all tensors are floating point numbers of the dtype of the first."""
    (first, leader), *others = tensors.items()
    require_floating(first, leader)
    for name, tensor in others:
        if tensor.dtype != leader.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, {first} is {leader.dtype}; they must agree")


def require_vectors(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the last axis lies in memory without gaps, and, if its rows fill 16 bytes, on such boundaries.

    Raises:
        ValueError: it doesn't: kernels read 16 bytes at a time, and no backend is more generous than another.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has the strides {tensor.stride()}; its last axis must be contiguous")
    size = tensor.element_size()
    if (tensor.shape[-1] * size) % ALIGNMENT == 0 and (tensor.storage_offset() * size) % ALIGNMENT:
        offset = tensor.storage_offset()
        raise ValueError(f"{name} starts {offset} elements into its storage; it must start at {ALIGNMENT} bytes")


def version_of(tensor: torch.Tensor) -> int:
    """Return how often `tensor` was written to; tensors of the inference mode don't count it."""
    return -1 if tensor.is_inference() else tensor._version


def require_sample_table(name: str, table_M5: torch.Tensor, token_offset: int, tokens: int) -> None:
    """Raise `ValueError` unless the samples follow each other from token 0 and cover the tokens asked for.

    A table is read once: the layers of a model are called with the same tensor.

    Args:
        name: of the table.
        table_M5: per sample its first token, text tokens and grid t, h, w.
        token_offset, tokens: what is looked up in it.
    """
    if table_M5.is_meta or torch.compiler.is_compiling():
        return  # a traced tensor has no values
    known = _tables.get(table_M5)
    if known is None or known[0] != version_of(table_M5):
        known = (version_of(table_M5), _tokens_of(name, table_M5.tolist()))
        _tables[table_M5] = known
    if token_offset + tokens > known[1]:
        raise ValueError(f"{name} covers {known[1]} tokens; asked for {token_offset} to {token_offset + tokens}")


def _tokens_of(name: str, rows: list[list[int]]) -> int:
    if not rows:
        raise ValueError(f"{name} has no samples")
    end = 0
    for place, (start, text, *grid) in enumerate(rows):
        if min(text, *grid) < 0 or start != end:
            raise ValueError(f"{name} doesn't add up at sample {place}: {[start, text, *grid]} after {end} tokens")
        end += text + grid[0] * grid[1] * grid[2]
    if end >= 2**31:
        raise ValueError(f"{name} holds {end} tokens; a pack has less than 2^31")
    return end
