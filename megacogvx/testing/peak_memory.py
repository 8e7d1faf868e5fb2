"""How much memory the tensors of a computation hold at most, exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by `run` hold at a time, its result among them.

    From the memory events of torch's profiler: free of what an allocator keeps for later, and of what was there before.
    Copies that a backend makes outside torch's allocator (oneDNN's other layouts) are not in it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    held = peak = 0
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak
