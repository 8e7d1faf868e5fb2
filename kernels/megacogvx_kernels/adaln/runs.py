"""Which tokens share a row of a modulation table: the order in which its gradient is summed, alike on all devices."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from megacogvx_kernels.transfer import on_host, to_device, version_of

SHORTEST, LONGEST, ENOUGH = 32, 64, 1024  # tokens of a run; runs that fill a GPU

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def runs_of(rows_S: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the tokens into runs of consecutive ones with the same row.

    The layers of a model are called with the same `rows_S`: it is looked at once, and if `to_device` brought it there,
    no layer waits for the device.

    Args:
        rows_S: integers in [0, num_rows), at least one.
        num_rows: R.

    Returns:
        int64 `[G, 3]`: first token, end and row of each run, sorted by row and then by token; and int64 `[R + 1]`: the
        first run of each row, then G.

    Raises:
        ValueError: a row is out of range.
    """
    known, state = _known.get(rows_S), (version_of(rows_S), num_rows)
    if known is None or known[0] != state:
        known = (state, _find(rows_S, num_rows))
        _known[rows_S] = known
    found: tuple[torch.Tensor, torch.Tensor] = known[1]
    return found


def _find(rows_S: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = on_host(rows_S).long()
    tokens = len(rows)
    if not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
        raise ValueError(f"rows_S holds {int(rows.min())} to {int(rows.max())}; the table has {num_rows} rows")
    changes = torch.nonzero(rows[1:] != rows[:-1])[:, 0] + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), changes])
    ends = torch.cat([starts[1:], torch.tensor([tokens])])
    longest = min(LONGEST, max(SHORTEST, tokens // ENOUGH))
    pieces = (ends - starts + longest - 1) // longest
    piece = torch.arange(int(pieces.sum())) - (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    start = starts.repeat_interleave(pieces) + piece * longest
    end = torch.minimum(start + longest, ends.repeat_interleave(pieces))
    row = rows[start]
    order = row.argsort(stable=True)
    runs_G3 = torch.stack([start, end, row], dim=1)[order].contiguous()
    counts = torch.bincount(row, minlength=num_rows)
    run_starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return to_device(runs_G3, rows_S.device), to_device(run_starts, rows_S.device)
