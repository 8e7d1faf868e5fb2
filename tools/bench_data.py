#!/usr/bin/env python
"""Read 400 samples of 0.05-8 MB at random, alternately with raw memcpy of the same bytes.

One process reads for a while by each method in turn, so that what else the machine does falls on all of them; the table
tells each method's rate and its ratio to memcpy by CPU time (median of the passes). Every method copies latents and
text of a sample into one and the same buffer, which exists before; that it holds the right bytes is looked at first.
Peers live in environments of their own: the same script runs in each, and reports its ratio to memcpy there.

python tools/bench_data.py                                     this format, and the peers that are installed here
python tools/bench_data.py --peer mosaic=ENVIRONMENT/bin/python --peer energon=OTHER/bin/python
python tools/bench_data.py --open 10000000                     also the time to open so many samples
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from bench_data_peers import IN_ORDER, PEERS, Reader
from rich.console import Console
from rich.table import Table

from megacogvx.data.indexed import DatasetWriter, EncoderInfo, IndexedDataset, finish_dataset
from megacogvx.data.indexed.durable import write_atomically
from megacogvx.data.indexed.layout import COLUMNS, aligned, write_index
from megacogvx.log import progress

SAMPLES, PASSES = 400, 7
LARGE = (41, 96, 170)  # latents of ten seconds of 768 x 1360, 43 MB of moments; four of them fill 700k tokens
CLASSES = ((0.0, 99.0), (0.0, 0.2), (0.2, 1.0), (1.0, 99.0))  # MB
ENCODER = EncoderInfo(
    text_kind="real", text_length=226, text_width=64, latent_channels=16, latent_scale_factor=1.0,
    vae_fingerprint="random", text_encoder_fingerprint="random",
)  # fmt: skip


def sizes() -> list[tuple[int, int, int]]:
    """Return T, h, w of 400 samples of 0.05 to 8 MB, log-uniform."""
    megabytes = np.exp(np.random.default_rng(0).uniform(np.log(0.05), np.log(8), SAMPLES))
    frames = [1 if size < 0.2 else 4 if size < 1 else 13 for size in megabytes]
    return [(t, 16, 2 * max(1, int(size * 1e6 / (t * 16 * 128)))) for t, size in zip(frames, megabytes, strict=True)]


def write(folder: Path, sizes: Sequence[tuple[int, int, int]]) -> None:
    """Write samples of these latent sizes; what is in them doesn't matter."""
    draw = torch.Generator().manual_seed(0)
    with DatasetWriter(folder, ENCODER) as writer:
        for number, size in enumerate(progress(sizes, "write")):
            latents = torch.randint(-(2**15), 2**15, (*size, 32), generator=draw, dtype=torch.int16)
            text = torch.randn(20 + number % 200, 64, generator=draw).bfloat16()
            writer.add_item(latents=latents.view(torch.bfloat16), text=text, sample_id=number, metadata={})
        writer.finalize()
    finish_dataset(folder)


def memcpy(folder: Path) -> Reader:
    """Raw copies out of the mapped .bin, latents and text of each record as one span known beforehand."""
    columns = IndexedDataset(folder, "never").shards[0].index.columns
    data = np.memmap(folder / "shard-00000.bin", np.uint8, "c").view(np.ndarray)
    starts = columns["record"].astype(int) + 64
    ends = columns["text_offset"].astype(int) + columns["text_length"].astype(int) * 128
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))

    def read(number: int, buffer: np.ndarray) -> None:
        start, end = spans[number]
        buffer[: end - start] = data[start:end]

    return read


def ours(folder: Path, **options: str) -> Reader:
    """`IndexedDataset.read_into`."""
    return IndexedDataset(folder, **options).read_into  # type: ignore[arg-type, return-value]


def ours_as_tensors(folder: Path, **options: str) -> Reader:
    """`IndexedDataset.sample`, and a copy of its two tensors."""
    dataset = IndexedDataset(folder, **options)  # type: ignore[arg-type]

    def read(number: int, buffer: np.ndarray) -> None:
        record, out, done = dataset.sample(number), torch.from_numpy(buffer).view(torch.bfloat16), 0
        for tensor in (record.latents, record.text):
            out[done : done + tensor.numel()].copy_(tensor.view(-1))
            done += tensor.numel()

    return read


METHODS: dict[str, tuple[str, Callable[[Path], Reader]]] = {
    "memcpy": ("numpy", memcpy),
    "ours": ("numpy", lambda folder: ours(folder, verify="never")),
    "ours, verified": ("numpy", ours),
    "ours, pread": ("numpy", lambda folder: ours(folder, verify="never", access="pread")),
    "ours, as tensors": ("numpy", lambda folder: ours_as_tensors(folder, verify="never")),
    **PEERS,
}
Ratios = dict[str, list[tuple[float, float]]]  # per method (MB/s, ratio to memcpy) of each size class


def measure(readers: dict[str, Reader], numbers: list[int], passes: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each pass over `numbers`, the methods taking turns."""
    buffer = np.zeros(48 << 20, np.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for turn in progress(range(passes + 1), "read"):
        for name, read in readers.items():
            began = time.process_time()
            for number in numbers:
                read(number, buffer)
            if turn:  # the first pass warms the page cache and the mappings
                seconds[name].append(time.process_time() - began)
    return seconds


def check(folder: Path, readers: dict[str, Reader], count: int = 5) -> None:
    """Fail unless every method copies the latents of the first samples and, behind them or at the next 64, the text."""
    dataset, buffer = IndexedDataset(folder), np.zeros(48 << 20, np.uint8)
    for number in range(count):  # in order, for those that know no other
        record = dataset.sample(number)
        latents, text = (part.view(torch.uint8).numpy().ravel() for part in (record.latents, record.text))
        end = len(latents)
        for name, read in readers.items():
            buffer[: end + 64 + len(text)] = 0
            read(number, buffer)
            places = (end, aligned(end))
            same = any(np.array_equal(buffer[place : place + len(text)], text) for place in places)
            assert same and np.array_equal(buffer[:end], latents), f"{name} copied something else for sample {number}"


def ratios(folder: Path, names: list[str], passes: int) -> Ratios:
    """Measure the methods `names`, memcpy among them, in this process."""
    readers = {name: METHODS[name][1](folder) for name in names}
    check(folder, readers)
    megabytes = np.array([np.prod(size) * 64 / 1e6 for size in sizes()])
    result: Ratios = {name: [] for name in names}
    for low, high in CLASSES:
        numbers = np.random.default_rng(1).permutation(np.flatnonzero((megabytes >= low) & (megabytes < high)))
        repeated = numbers.tolist() * (1 if high > 1 else 5)
        asked = {name: read for name, read in readers.items() if high - low > 98.5 or name not in IN_ORDER}
        seconds = measure(asked, repeated, passes)
        for name in asked:
            ratio = statistics.median(a / b for a, b in zip(seconds["memcpy"], seconds[name], strict=True))
            result[name].append((megabytes[repeated].sum() / statistics.median(seconds[name]), ratio))
    return result


def peer_ratios(name: str, python: str, passes: int) -> Ratios:
    """Measure one peer in its own environment; what doesn't run there is named, and left out."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]
    command = [python, __file__, "--methods", "memcpy", name, "--passes", str(passes), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        Console(stderr=True).print(f"{name} does not run: {done.stderr.strip().splitlines()[-1]}")
        return {}
    found: Ratios = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name], f"memcpy beside {name}": found["memcpy"]}


def reader_memory(folder: Path) -> int:
    """Return the bytes of memory of its own that opening and reading every sample once takes, the buffer apart."""
    buffer = np.full(16 << 20, 1, np.uint8)  # touched, so that its pages are there
    before = _anonymous()
    dataset = IndexedDataset(folder)
    for number in range(len(dataset)):
        dataset.read_into(number, buffer)
    return _anonymous() - before


def index_bytes(folder: Path) -> str:
    """Tell the bytes of index of a sample."""
    dataset, size = IndexedDataset(folder), sum(path.stat().st_size for path in folder.glob("*.idx"))
    return f"index {size / len(dataset):.1f} bytes a sample of {np.mean(dataset.frames):.1f} latent frames in the mean"


def open_times(folder: Path, count: int, per_shard: int = 100_000) -> str:
    """Open a dataset of `count` samples of one latent frame, whose .bin files hold nothing; tell how it went."""
    folder.mkdir()
    stride = 4096
    for shard in progress(range(-(-count // per_shard)), "make indexes"):
        n = min(per_shard, count - shard * per_shard)
        record = 64 + stride * np.arange(n)
        columns = {name: np.zeros(n, COLUMNS[name]) for name in COLUMNS}
        columns |= {
            "sample_id": np.arange(n) + shard * per_shard, "record": record, "frames": np.ones(n), "height": np.ones(n),
            "width": np.ones(n), "text_offset": record + 128, "text_length": np.ones(n),
            "metadata_offset": record + 256, "metadata_length": np.zeros(n),
        }  # fmt: skip
        _write_hollow(folder, f"shard-{shard:05d}", columns, 64 + stride * n)
    finish_dataset(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.idx"))
    anonymous, began, busy = _anonymous(), time.perf_counter(), time.process_time()
    dataset = IndexedDataset(folder)
    opened, busy = time.perf_counter() - began, time.process_time() - busy
    memory = (_anonymous() - anonymous) / 2**20
    _ = dataset.shards[0].source
    first = time.perf_counter() - began - opened
    return (
        f"{count:,} samples opened in {opened:.2f} s ({busy:.2f} s of CPU), {memory:.1f} MiB more memory of its own; a "
        f"shard's first use {first * 1e3:.0f} ms more; index {size / count:.0f} bytes a sample of one latent frame"
    )


def _anonymous() -> int:
    """Return the bytes of memory that are this process's own, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def _write_hollow(folder: Path, name: str, columns: dict[str, np.ndarray], bin_bytes: int) -> None:
    with DatasetWriter(folder, ENCODER, name) as writer:
        assert writer._file is not None
        writer._file.truncate(bin_bytes)
        writer._file.flush()
        index = write_index(writer._uuid, ENCODER, bin_bytes, columns)
        writer._temporary.replace(folder / f"{name}.bin")
        write_atomically(folder / f"{name}.idx", index)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer's own interpreter")
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--open", type=int, default=0, help="also open a dataset of so many samples")
    parser.add_argument("--json", action="store_true", help="print the ratios alone, as one line of JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "dataset"
        if arguments.methods:
            write(folder, sizes())
        chosen = [name for name in arguments.methods if _is_installed(METHODS[name][0])]
        found = ratios(folder, chosen, arguments.passes) if chosen else {}
        if arguments.json:
            sys.stdout.write(json.dumps(found) + "\n")
            return
        for peer in arguments.peer:
            found |= peer_ratios(*peer.split("=", 1), arguments.passes)
        console = Console()
        console.print(_table(found, arguments.passes))
        if "ours" in chosen:
            console.print(f"memory of a reader: {reader_memory(folder) / 2**20:.2f} MiB; {index_bytes(folder)}")
        if arguments.open:
            console.print(open_times(Path(root) / "many", arguments.open))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that isn't there
        return False


def _table(found: Ratios, passes: int) -> Table:
    table = Table(title=f"{SAMPLES} samples: MB/s of CPU time, and of memcpy beside it; median of {passes} passes")
    table.add_column("method")
    for low, high in CLASSES:
        table.add_column("all" if high - low > 98.5 else f"{low:g}-{high:g} MB" if high < 99 else f"from {low:g} MB")
    for name, cells in found.items():
        table.add_row(name, *(f"{rate:,.0f}  {ratio:.2f}" for rate, ratio in cells))
    return table


if __name__ == "__main__":
    main()
