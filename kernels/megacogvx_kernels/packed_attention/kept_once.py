"""The outputs of several kernel calls as one tensor, of which their backward passes read: none is kept twice.

A kernel keeps its output for its backward pass, and the next operation keeps the joined one. Autograd's saved tensor
hooks (`torch.autograd.graph.saved_tensors_hooks`) let the first be given up for a view of the second.
"""

from __future__ import annotations

from types import TracebackType

import torch


class KeptOnce:
    """Within it, kernels are called; `join` puts their outputs after each other.

    with KeptOnce() as once:
        parts = [kernel(sample) for sample in samples]
        out = once.join(parts)
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def __enter__(self) -> KeptOnce:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._kept.clear()  # the graph alone holds them from here on

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return `parts`, `[S, N, K]` each, after each other; what was kept of their memory is given up.

        Backward: the kernels read their outputs out of the joined tensor, which nobody may change in place.
        """
        joined = torch.cat(parts)
        first = 0
        for part in parts:
            for kept in self._kept if part.is_contiguous() else ():
                kept.move(part, joined.detach(), first)
            first += part.numel()
        return joined

    def _keep(self, tensor: torch.Tensor) -> _Kept:
        self._kept.append(_Kept(tensor))
        return self._kept[-1]


class _Kept:
    """A tensor that a kernel keeps, and where it lies now."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def move(self, part: torch.Tensor, joined: torch.Tensor, first: int) -> None:
        """If this is memory of `part`, read it from element `first` of `joined` on, where the same values lie."""
        tensor = self.tensor
        if tensor.untyped_storage()._cdata == part.untyped_storage()._cdata:
            offset = first + tensor.storage_offset() - part.storage_offset()
            self.tensor = joined.as_strided(tensor.shape, tensor.stride(), joined.storage_offset() + offset)
