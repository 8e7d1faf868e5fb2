"""Everything that is measured of the kernels, in one command under 8 minutes on one GPU.

Takes the library that was made of these sources (kernels/megacogvx_kernels/_compiled.so and .json, built there or
brought along), else builds it with nvcc for this card alone. Checks the kernels against their references and beyond
2^31 elements, measures the card's copy bandwidth, then times each op forward and backward against the reference run
eagerly, the halo over virtual ranks and between two processes, attention's kernels, other people's kernels where they
are installed, and last the references under torch.compile. What fails leaves a note in its row. Results are written
after every case to kernels/benchmarks/results/, or the folder of --out, and go into the table of kernels/README.md; a
second call goes on where the first one stopped. It needs torch alone.

    python kernels/benchmarks/run_all.py                    # measure, and write both
    python kernels/benchmarks/run_all.py --seconds 300      # begin no further case 5 minutes after the start
    python kernels/benchmarks/run_all.py --only "qk_norm_rope: 75000" --once      # a few calls of one, for a profiler:
    ncu --clock-control none --set full -k regex:qk_norm --launch-count 3 python ... --only "..." --once
    python kernels/benchmarks/run_all.py --table            # only write the table again, from the latest results
    python kernels/benchmarks/run_all.py --dry-run          # the same code on a CPU, tiny; times mean nothing
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(PROJECT / "kernels"), str(PROJECT)]

import bench_attention  # noqa: E402  (beside this file, not installed)
import bench_checks  # noqa: E402
import bench_clips  # noqa: E402
import bench_peers  # noqa: E402
import bench_tokens  # noqa: E402
import results as kept  # noqa: E402
import timing  # noqa: E402
from scale import DRY, REAL, Scale  # noqa: E402

import toolchain  # noqa: E402

SECONDS = 420.0  # of 8 minutes; the longest case, a torch.compile, has the rest


@dataclass(frozen=True)
class Case:
    """One thing to measure: its name, the size of the rows that it fills, their ops, and the function that does it."""

    name: str
    size: str
    ops: tuple[str, ...]
    measure: Callable[[], dict[str, Any] | None]


def plan(scale: Scale, bandwidth: float, ways: str = "eager") -> list[Case]:
    """Return all cases, the most important first: checks, ours and eager torch, other kernels, torch.compile."""
    checks = {
        "check: against the references": bench_checks.against_references,
        "check: more than 2^31 elements": bench_checks.beyond_2_to_the_31,
    }
    cases = [Case(name, "", (), partial(check, scale)) for name, check in checks.items()]
    sizes = [(tokens, heads) for tokens in scale.tokens for heads in scale.heads]
    cases += [_of_tokens(op, *size, scale, bandwidth, ways) for size in sizes for op in bench_tokens.OPS]
    cases += _of_clips(scale, bandwidth, ways)
    for how in bench_attention.KERNELS:
        for samples, tokens in scale.packs:
            size, op = bench_attention.size_of(samples, tokens), f"attention forward + backward, {how}"
            attend = partial(bench_attention.measure, how, samples, tokens, scale)
            cases.append(Case(f"{op}: {size}", size, (op,), attend))
    cases += [_of_peer(name, scale, bandwidth) for name in bench_peers.PEERS]
    return cases if ways == "once" else [*cases, *_compiled(scale, bandwidth)]


def rows(scale: Scale) -> list[tuple[str, str]]:
    """Return op and size of every row of the table, ordered by op."""
    found = dict.fromkeys((op, case.size) for case in plan(scale, 1.0) for op in case.ops)
    places = {op: place for place, op in enumerate(dict.fromkeys(op for op, _ in found))}
    return sorted(found, key=lambda row: places[row[0]])


def _of_tokens(op: str, tokens: int, heads: int, scale: Scale, bandwidth: float, ways: str) -> Case:
    size = bench_tokens.size_of(op, tokens, heads, scale)
    ops = tuple(f"{op} {way}" for way in bench_tokens.WAYS)
    name = f"{op}: {size}" + (" compiled" if ways == "compile" else "")
    return Case(name, size, ops, partial(bench_tokens.measure, op, tokens, heads, scale, bandwidth, ways))


def _of_clips(scale: Scale, bandwidth: float, ways: str) -> list[Case]:
    clip, shard = (" x ".join(map(str, shape)) for shape in (scale.clip, scale.shard))
    found = [_of_norm(is_last, scale, bandwidth, ways) for is_last in (False, True)]
    spread = f"{bench_clips.LAYERS} causal convolutions over {bench_clips.RANKS} virtual ranks"
    between = "causal_halo between two processes on one card"
    for op, size, measure in (
        ("causal_halo pack", f"2 x {clip}, 2 frames", partial(bench_clips.pack, scale, bandwidth)),
        (spread, f"1 x {shard}, kernel 3", partial(bench_clips.virtual_ranks, scale)),
        (between, "1 x 128 x 16 x 240 x 360, 2 frames", partial(bench_clips.two_processes, scale)),
    ):
        found.append(Case(f"{op}: {size}", size, (op,), measure))
    return found


def _of_norm(is_last: bool, scale: Scale, bandwidth: float, ways: str) -> Case:
    size = " x ".join(map(str, scale.clip)) + (" channels-last" if is_last else "")
    ops = tuple(f"group_norm_moments + SiLU {way}" for way in bench_tokens.WAYS)
    name = f"group_norm_moments: {size}" + (" compiled" if ways == "compile" else "")
    return Case(name, size, ops, partial(bench_clips.group_norm, is_last, scale, bandwidth, ways))


def _of_peer(name: str, scale: Scale, bandwidth: float) -> Case:
    tokens, heads = scale.compiled[0]
    size = f"{tokens} tokens x {heads} heads of {scale.head_width}"
    ops = tuple(f"{name} {way}" for way in bench_tokens.WAYS)
    return Case(f"{name}: {size}", size, ops, partial(bench_peers.measure, name, tokens, heads, scale, bandwidth))


def _compiled(scale: Scale, bandwidth: float) -> list[Case]:
    found = [_of_tokens(op, *size, scale, bandwidth, "compile") for size in scale.compiled for op in bench_tokens.OPS]
    norms = [_of_norm(is_last, scale, bandwidth, "compile") for is_last in (False, True)]
    return [*found[: len(bench_tokens.OPS)], *norms, *found[len(bench_tokens.OPS) :]]


def main() -> int:
    """Measure, and write what was found; exit status 3 if cases are left, 4 if the card has to be taken anew."""
    arguments, began = _arguments(), time.monotonic()
    if arguments.table:
        kept.write_table(kept.latest(), rows(REAL))
        return 0
    scale = DRY if arguments.dry_run else REAL
    import torch

    if not scale.is_dry and not torch.cuda.is_available():
        sys.exit("run_all.py measures on a GPU, and torch sees none here; --dry-run walks through it on a CPU")
    print(_library(scale), flush=True)
    folder = arguments.out or (Path(tempfile.mkdtemp()) if scale.is_dry else kept.RESULTS)
    results = kept.resume(kept.circumstances(toolchain.fingerprint()), [folder, kept.RESULTS])
    results["commit"] = arguments.commit or results["commit"]
    if not results["bandwidth"]:
        results["bandwidth"] = timing.copy_bandwidth(scale)
    cases = plan(scale, results["bandwidth"], "once" if arguments.once else "eager")
    chosen = [case for case in cases if arguments.only in case.name]
    if arguments.once:
        for case in chosen:
            print(case.name, case.measure())
        return 0
    status = _measure(chosen, results, scale, folder, arguments, began)
    results["said"] = bench_attention.fastest(results["rows"], scale)
    print(f"results: {kept.save(results, folder)}")
    if not scale.is_dry and folder == kept.RESULTS:
        kept.write_table(results, rows(REAL))
    print(kept.table(results, rows(scale)))
    return status


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no further case so long after the start")
    parser.add_argument("--out", type=Path, help="folder of the results; then kernels/README.md stays as it is")
    parser.add_argument("--commit", default="", help="of these sources, where there is no .git to ask")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--again", action="store_true", help="also cases that have failed before")
    parser.add_argument("--once", action="store_true", help="ours alone, and nothing is written: under a profiler")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU; times mean nothing")
    return parser.parse_args()


def _library(scale: Scale) -> str:
    """Make sure of a library of these sources with kernels for this card; say what it is. A dry run builds nothing.

    Raises:
        SystemExit: there is none, and it can't be built.
    """
    ops, architecture = PROJECT / "kernels" / "megacogvx_kernels", _architecture(scale)
    if architecture in (found := toolchain.built_for(ops)):
        return f"the library that is there, for sm_{', sm_'.join(map(str, found))}"
    began = time.monotonic()
    try:
        tools = toolchain.find_tools("cuda", (architecture,))
        if not scale.is_dry:
            toolchain.compile_library(tools, ops, PROJECT / "build" / "benchmark")
    except toolchain.BuildError as error:
        if scale.is_dry:
            return f"no library with kernels, and none can be built here: {error}"
        sys.exit(f"run_all.py: {error}")
    return f"built with {tools.nvcc} for sm_{architecture} in {time.monotonic() - began:.0f} s"


def _architecture(scale: Scale) -> int:
    """Return which of the architectures that are built for this card takes: the newest that isn't newer than it."""
    import torch

    capability = (9, 0) if scale.is_dry else torch.cuda.get_device_capability()
    return max((each for each in toolchain.ARCHITECTURES if divmod(each, 10) <= capability), default=80)


def _measure(
    cases: list[Case], results: Any, scale: Scale, folder: Path, arguments: argparse.Namespace, began: float
) -> int:
    """Measure what isn't measured yet; a case that fails says so in its rows and doesn't stop the others."""
    for place, case in enumerate(cases, 1):
        done = results["done"].get(case.name)
        if done and not (arguments.again and "error" in done):
            continue
        elapsed = time.monotonic() - began
        if elapsed > arguments.seconds:
            print(f"time is up before case {place} of {len(cases)}; the same command goes on from here")
            return 3
        print(f"[{elapsed:.0f} of {arguments.seconds:.0f} s, {place} of {len(cases)}] {case.name}", flush=True)
        results["done"][case.name] = how = {"error": "the process ended"}  # unless it comes back
        kept.save(results, folder)
        how.update(_guarded(case, results))
        how["seconds"] = round(time.monotonic() - began - elapsed, 1)
        if how["error"] == "":
            del how["error"]
        kept.save(results, folder)
        print(f"    {how}", flush=True)
        if not _is_card_alive(scale):
            print("the card's context is lost; the same command goes on after this case")
            return 4
    return 0


def _guarded(case: Case, results: Any) -> dict[str, Any]:
    """Run a case and merge what it found; return the error, or ""."""
    try:
        kept.merge(results, case.measure() or {}, case.size)
    except ImportError as error:
        problem = f"not installed ({error.name or error})"
    except Exception as error:  # of any backend
        problem = timing.in_short(error)
    else:
        return {"error": ""}
    kept.merge(results, {op: {"notes": {"ms": problem}} for op in case.ops}, case.size)
    return {"error": problem}


def _is_card_alive(scale: Scale) -> bool:
    """An access outside of memory ends the context: every later call would fail for its sake."""
    if scale.is_dry:
        return True
    import torch

    try:
        timing.release(scale)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
