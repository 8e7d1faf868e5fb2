"""Argument checks that the ops share: a wrong tensor is named before any implementation sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megacogvx_kernels.transfer import on_host, version_of

ALIGNMENT = 16  # bytes of one access of a kernel
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What was found out about tensors that every layer of a model is called with; asking a device again would stall it.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def require_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raise `TypeError` unless it is a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")


def require_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise unless `tensor` has the shape `expected` (None: any size).

    Raises:
        TypeError: it isn't a tensor.
        ValueError: the shape differs.
    """
    require_tensor(name, tensor)
    fits = tensor.dim() == len(expected) and all(
        want in (None, size) for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; expected ({wanted})")


def require_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise `TypeError` unless `tensor` is one of the floating point numbers that the ops compute with."""
    require_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise TypeError(f"{name} must be floating point ({known}), not {tensor.dtype}")


def require_integer(name: str, tensor: torch.Tensor) -> None:
    """Raise `TypeError` unless `tensor` holds int32 or int64."""
    require_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")


def require_count(name: str, number: int) -> None:
    """Raise unless it is an integer that isn't negative.

    Raises:
        TypeError: it is something else (True counts as something else).
        ValueError: it is negative.
    """
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, not {type(number).__name__}")
    if number < 0:
        raise ValueError(f"{name}={number} must not be negative")


def require_positive(name: str, number: float) -> None:
    """Raise `ValueError` unless it is greater than 0; NaN isn't."""
    if not number > 0:
        raise ValueError(f"{name}={number} must be greater than 0")


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
    if (tensor.shape[-1] * tensor.element_size()) % ALIGNMENT == 0 and not is_aligned(tensor):
        raise ValueError(
            f"{name} starts {tensor.storage_offset()} elements into its storage, at no multiple of {ALIGNMENT} bytes; "
            "it must start at one"
        )


def is_aligned(tensor: torch.Tensor) -> bool:
    """Tell whether it begins where a kernel can read it 16 bytes at a time; of a traced one, by its place alone."""
    offset = tensor.storage_offset() * tensor.element_size()
    if torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return bool(offset % ALIGNMENT == 0)
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # one of functorch's
        address = 0
    return bool((address or offset) % ALIGNMENT == 0)  # meta tensors lie at 0


def packed(tensor: torch.Tensor) -> torch.Tensor:
    """Return it contiguous and at a multiple of 16 bytes; a copy only where it isn't.

    For what nobody lays out by hand: parameters (a view into a flat buffer may start anywhere) and gradients.
    """
    tensor = tensor.contiguous()
    return tensor if is_aligned(tensor) else tensor.clone()


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
    covered = _once(table_M5, lambda rows: _tokens_of(name, rows))
    if token_offset + tokens > covered:
        raise ValueError(f"{name} covers {covered} tokens; asked for {token_offset} to {token_offset + tokens}")


def require_values(name: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
    """Raise `ValueError` unless the tensor `[M]` holds these integers; it is read once, as a sample table is."""
    if tensor.is_meta or torch.compiler.is_compiling():
        return
    values = _once(tensor, tuple)
    if values != tuple(expected):
        raise ValueError(f"{name} holds {values}; expected {tuple(expected)}")


def _once(tensor: torch.Tensor, find: Callable[[list[Any]], Any]) -> Any:
    """Return what `find` makes of a tensor's values; they are read again only if the tensor was written to."""
    known = _tables.get(tensor)
    if known is None or known[0] != version_of(tensor):
        known = (version_of(tensor), find(on_host(tensor).tolist()))
        _tables[tensor] = known
    return known[1]


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
