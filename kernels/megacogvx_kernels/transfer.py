"""Tensors from the host to a GPU without the host waiting for it, and what the host knows of them afterwards.

A copy out of ordinary memory makes the host wait until the GPU has done all that it was given: torch synchronises the
stream (`aten/src/ATen/native/cuda/Copy.cu` of torch 2.13, `copy_kernel_cuda`). Then nothing is queued, and the GPU
waits in its turn. A copy out of pinned memory is queued like a kernel; torch's allocator of pinned memory hands a block
out again only when the copies from it are done.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Integer tensors on a device -> (version, the tensor on the host that they were copied from).
_origins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def to_device(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return `tensor` on `device`, behind what the device was given before; the host doesn't wait.

    Args:
        tensor: on the host, if pinned not to be written to until the device has come so far. One that is elsewhere, or
            goes elsewhere than to a GPU, goes as `tensor.to` sends it.
        device: where to.
        dtype: of the result; None keeps it. It is cast before.
    """
    tensor, device = tensor.to(dtype or tensor.dtype), torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    there = _queue_copy(tensor, device)
    if not tensor.is_floating_point():
        _origins[there] = (version_of(there), tensor)
    return there


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of `tensor` on the host, without waiting if `to_device` brought them and none has changed."""
    known = _origins.get(tensor)
    if known is not None and known[0] == version_of(tensor):
        origin: torch.Tensor = known[1]
        return origin
    return tensor.detach().cpu()


def version_of(tensor: torch.Tensor) -> int:
    """Return how often `tensor` was written to; tensors of the inference mode don't count it."""
    return -1 if tensor.is_inference() else tensor._version


def _queue_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)
