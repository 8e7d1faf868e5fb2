"""The compiled ops, if this installation has any: loaded once, and asked which calls they take.

`setup.py` puts `_compiled.so` beside this file (kernels/toolchain.py tells with what). Which implementation answers is
chosen here, without a setting: CUDA kernel, C++ on the CPU, or the reference. The log names it once per op.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
_log = logging.getLogger("megacogvx.kernels")
_is_off = False


def _facts() -> dict[str, list[str]]:
    facts: dict[str, list[str]] = json.loads((_FOLDER / "_compiled.json").read_text())
    return facts


@cache
def available() -> frozenset[str]:
    """Return the device types that have compiled ops: of "cuda" and "cpu"; empty without a library."""
    try:
        facts = _facts()
        torch.ops.load_library(_FOLDER / "_compiled.so")
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        _log.warning("the compiled ops can't be loaded, their references answer: %s", error)
        return frozenset()
    return frozenset(("cpu", "cuda") if facts["cuda"] and torch.version.cuda else ("cpu",))


def answers(op: str, tensor: torch.Tensor, fits_kernel: bool, on_cpu: bool = True) -> bool:
    """Tell whether the compiled op takes this call, and log the choice the first time.

    Args:
        op: its name, for the log.
        tensor: the main argument; its device decides.
        fits_kernel: what the CUDA kernel asks of dtype, sizes and layout is given; C++ takes everything.
        on_cpu: the op has a C++ version; False where torch's own is as good.
    """
    device = tensor.device.type
    chosen = not _is_off and device in available() and (on_cpu if device == "cpu" else fits_kernel)
    chosen = chosen and (device == "cpu" or _runs_on(tensor.device))
    _name_once(op, {"cpu": "C++", "cuda": "CUDA"}[device] if chosen else "reference", device)
    return chosen


@cache
def _runs_on(device: torch.device) -> bool:
    """Tell whether the library holds machine code, or PTX, for this GPU: from the oldest one it was built for on."""
    oldest = min(int(name.removeprefix("sm_")) for name in _facts()["cuda"])
    return torch.cuda.get_device_capability(device) >= divmod(oldest, 10)


@contextmanager
def references_only() -> Iterator[None]:
    """Let the references answer within the block: for tests and benchmarks."""
    global _is_off
    before, _is_off = _is_off, True
    try:
        yield
    finally:
        _is_off = before


@cache
def _name_once(op: str, implementation: str, device: str) -> None:
    _log.info("%s on %s: %s", op, device, implementation)
