"""Argument checks that the ops share: a wrong tensor is named before any implementation sees it."""

from __future__ import annotations

import torch


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
