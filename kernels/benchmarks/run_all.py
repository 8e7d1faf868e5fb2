"""Everything that is measured of the kernels, in one command under 8 minutes on one GPU.

Builds the library if its sources have changed, checks the kernels against their references, measures the card's copy
bandwidth, then times each op forward and backward against the reference run eagerly and compiled by torch, group norm,
the halo over virtual ranks, and attention. Results go to kernels/benchmarks/results/<date>_<card>.json and, as the
table of what was measured, into kernels/README.md.

    python kernels/benchmarks/run_all.py             # measure, and write both
    python kernels/benchmarks/run_all.py --table     # only write the table again, from the latest results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(PROJECT / "kernels"), str(PROJECT)]

RESULTS = FOLDER / "results"
README = PROJECT / "kernels" / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SECONDS = 8 * 60  # what is not begun by then is left out, and said to be
TOKENS, HEADS, WIDTH = (25_000, 75_000, 700_000), (48, 24, 6), 64
COLUMNS = ("op", "size", "ms", "share of copy bandwidth", "eager ms", "torch.compile ms")
ROWS = [
    *((f"qk_norm_rope {way}", f"{tokens} tokens x {heads} heads") for way in ("forward", "backward")
      for tokens in TOKENS for heads in HEADS),
    *((f"{op} {way}", f"{tokens} tokens x {heads * WIDTH}") for op in ("adaln_modulate", "gated_residual_adaln")
      for way in ("forward", "backward") for tokens in TOKENS for heads in HEADS),
    *((f"group_norm_moments + SiLU {way}", shape) for way in ("forward", "backward")
      for shape in ("128 x 17 x 240 x 360", "128 x 17 x 240 x 360 channels-last")),
    ("causal_halo pack", "2 x 128 x 17 x 240 x 360, 2 frames"),
    ("causal convolution over 4 virtual ranks", "1 x 128 x 16 x 120 x 180, kernel 3"),
    *((f"attention forward + backward, {how}", pack) for how in ("cuDNN per sample", "flash per sample", "varlen")
      for pack in ("1 x 17800 tokens", "4 x 18750 tokens", "1 x 75000 tokens")),
]  # fmt: skip


def table(results: dict[str, Any] | None) -> str:
    """Return the Markdown table of what was measured; without results, every row says so."""
    measured = results["rows"] if results else {}
    lines = [_headline(results), "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for op, size in ROWS:
        found = measured.get(f"{op}: {size}")
        cells = _cells(found) if found else ["not measured", "", "", ""]
        lines.append(f"| {op} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(results: dict[str, Any] | None) -> None:
    """Put the table between its two marks in kernels/README.md."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def latest() -> dict[str, Any] | None:
    """Return the newest file of results, or None."""
    files = sorted(RESULTS.glob("*.json"))
    return json.loads(files[-1].read_text()) if files else None


def main() -> int:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only write the table again")
    if parser.parse_args().table:
        write_table(latest())
        return 0
    import torch

    import toolchain

    if not torch.cuda.is_available():
        sys.exit("run_all.py measures on a GPU, and torch sees none here")
    tools = toolchain.find_tools("cuda")
    ops = PROJECT / "kernels" / "megacogvx_kernels"
    if not toolchain.is_current(ops, tools):
        toolchain.compile_library(tools, ops, PROJECT / "build" / "benchmark")
    import cases
    import timing

    cases.check()
    results = _circumstances(timing.copy_bandwidth())
    _measure(cases, results)
    RESULTS.mkdir(exist_ok=True)
    name = f"{results['date']}_{results['card'].replace(' ', '_')}.json"
    (RESULTS / name).write_text(json.dumps(results, indent=1) + "\n")
    write_table(results)
    print(table(results))
    return 0


def _measure(cases: Any, results: dict[str, Any]) -> None:
    """Fill `results["rows"]`; a case that fails says so in its row and doesn't stop the others."""
    began = time.monotonic()
    planned: dict[str, Callable[[], dict[str, float]]] = cases.planned(results["bandwidth"])
    assert set(planned) == {f"{op}: {size}" for op, size in ROWS}, "cases.py and ROWS must name the same measurements"
    for name, measure in planned.items():
        if time.monotonic() - began > SECONDS - 60:
            results["rows"][name] = {"note": "left out: out of time"}
            continue
        try:
            results["rows"][name] = measure()
        except Exception as error:  # of any backend, e.g. one that isn't in this torch
            results["rows"][name] = {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}
        print(name, results["rows"][name], flush=True)


def _circumstances(bandwidth: float) -> dict[str, Any]:
    import torch

    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    commit = ["git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"]
    driver, revision = (subprocess.run(c, capture_output=True, text=True).stdout.strip() for c in (asked, commit))
    return {
        "date": date.today().isoformat(),
        "card": torch.cuda.get_device_name(0),
        "driver": driver,
        "torch": torch.__version__,
        "commit": revision,
        "bandwidth": bandwidth,
        "rows": {},
    }


def _headline(results: dict[str, Any] | None) -> str:
    if results is None:
        return "Not measured yet: `python kernels/benchmarks/run_all.py` on a machine with a GPU fills this table."
    where = f"{results['card']}, driver {results['driver']}, torch {results['torch']}, commit {results['commit']}"
    return f"{results['date']}: {where}; a copy within its memory moves {results['bandwidth'] / 1e12:.2f} TB/s."


def _cells(found: dict[str, Any]) -> list[str]:
    if "note" in found:
        return [found["note"], "", "", ""]
    share = f"{found['share']:.0%}" if found.get("share") else ""
    others = (f"{found[key]:.3f}" if key in found else "" for key in ("eager", "compiled"))
    return [f"{found['ms']:.3f}", share, *others]


if __name__ == "__main__":
    sys.exit(main())
