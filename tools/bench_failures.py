"""Why a side of a benchmark on a GPU has no figures, in the few words that a table has room for."""

from __future__ import annotations

import torch


def reason(error: RuntimeError) -> str:
    """Return "out of memory", or which error it is and the beginning of what it says."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"
