#!/usr/bin/env python
"""Read 400 samples of 0.05-8 MB at random, alternately with raw memcpy of the same bytes; then a 700k-token pack.

One process reads for a while by each method in turn, so that what else the machine does falls on all of them; the table
tells each method's rate and its ratio to memcpy by CPU time (median of the passes). Peers that aren't installed are
left out: run the script in an environment of each peer's own, `--methods memcpy NAME` writes the samples anew.

python tools/bench_data.py                               this format, beside safetensors and Megatron-LM's layout
python tools/bench_data.py --open 10000000               also the time to open so many samples
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megacogvx.data.corpus import Corpus, DataConfig
from megacogvx.data.indexed import DatasetWriter, EncoderInfo, IndexedDataset, finish_dataset
from megacogvx.data.indexed.layout import COLUMNS, write_index
from megacogvx.data.indexed.manifest import write_atomically
from megacogvx.data.pack import read_pack
from megacogvx.log import progress

SAMPLES, PASSES = 400, 7
ENCODER = EncoderInfo(
    text_kind="real", text_length=226, text_width=64, latent_channels=16, latent_scale_factor=1.0,
    vae_fingerprint="random", text_encoder_fingerprint="random",
)  # fmt: skip
Reader = Callable[[int, torch.Tensor], int]  # copies sample n into a bf16 buffer, returns how many values


def sizes() -> list[tuple[int, int, int]]:
    """Return T, h, w of 400 samples of 0.05 to 8 MB, log-uniform."""
    megabytes = np.exp(np.random.default_rng(0).uniform(np.log(0.05), np.log(8), SAMPLES))
    frames = [1 if size < 0.2 else 4 if size < 1 else 13 for size in megabytes]
    return [(t, 16, 2 * max(1, int(size * 1e6 / (t * 16 * 128)))) for t, size in zip(frames, megabytes, strict=True)]


def write(folder: Path) -> None:
    """Write the samples; what is in them doesn't matter."""
    draw = torch.Generator().manual_seed(0)
    with DatasetWriter(folder, ENCODER) as writer:
        for number, size in enumerate(progress(sizes(), "write")):
            latents = torch.randint(-(2**15), 2**15, (*size, 32), generator=draw, dtype=torch.int16)
            text = torch.randn(20 + number % 200, 64, generator=draw).bfloat16()
            writer.add_item(latents=latents.view(torch.bfloat16), text=text, sample_id=number, metadata={})
        writer.finalize()
    finish_dataset(folder)


def copy(tensors: list[torch.Tensor], buffer: torch.Tensor) -> int:
    """Copy bf16 `tensors` one after the other into a buffer; returns how many values."""
    done = 0
    for tensor in tensors:
        count = tensor.numel()
        buffer[done : done + count].copy_(tensor.reshape(-1))
        done += count
    return done


def memcpy(folder: Path) -> Reader:
    """Raw copies out of the mapped .bin, latents and text of each record as one span known beforehand."""
    index = IndexedDataset(folder, "never").shards[0].index
    with (folder / "shard-00000.bin").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    data = torch.frombuffer(mapped, dtype=torch.bfloat16, count=len(mapped) // 2)
    columns = index.columns
    starts = columns["record"].astype(int) + 64
    ends = columns["text_offset"].astype(int) + columns["text_length"].astype(int) * 128
    spans = list(zip((starts // 2).tolist(), (ends // 2).tolist(), strict=True))

    def read(number: int, buffer: torch.Tensor) -> int:
        start, end = spans[number]
        buffer[: end - start].copy_(data[start:end])
        return end - start

    return read


def ours(folder: Path, **options: str) -> Reader:
    """`IndexedDataset.sample`."""
    dataset = IndexedDataset(folder, **options)  # type: ignore[arg-type]

    def read(number: int, buffer: torch.Tensor) -> int:
        record = dataset.sample(number)
        return copy([record.latents, record.text], buffer)

    return read


def safetensors_files(folder: Path) -> Reader:
    """A file of both tensors per sample."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    dataset = IndexedDataset(folder, "never")
    (folder / "peer").mkdir(exist_ok=True)
    for number in range(SAMPLES):
        record = dataset.sample(number)
        save_file(
            {"latents": record.latents.clone(), "text": record.text.clone()}, folder / f"peer/{number}.safetensors"
        )

    def read(number: int, buffer: torch.Tensor) -> int:
        with safe_open(folder / f"peer/{number}.safetensors", "pt") as file:
            return copy([file.get_tensor("latents"), file.get_tensor("text")], buffer)

    return read


def megatron(folder: Path) -> Reader:
    """Megatron-LM's IndexedDataset, bf16 as uint16, latents and text as two sequences of one prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dataset, prefix = IndexedDataset(folder, "never"), str(folder / "megatron")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number in range(SAMPLES):
        record = dataset.sample(number)
        for tensor in (record.latents, record.text):
            builder.add_item(tensor.reshape(-1).view(torch.uint16))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    peer = MegatronDataset(prefix)

    def read(number: int, buffer: torch.Tensor) -> int:
        return copy([torch.from_numpy(peer[2 * number + part]).view(torch.bfloat16) for part in (0, 1)], buffer)

    return read


METHODS: dict[str, tuple[str, Callable[[Path], Reader]]] = {
    "memcpy": ("torch", memcpy),
    "ours": ("torch", lambda folder: ours(folder, verify="never")),
    "ours, verified": ("torch", ours),
    "ours, pread": ("torch", lambda folder: ours(folder, verify="never", access="pread")),
    "safetensors": ("safetensors", safetensors_files),
    "megatron": ("megatron", megatron),
}


def measure(readers: dict[str, Reader], numbers: list[int], passes: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each pass over `numbers`, the methods taking turns."""
    buffer = torch.zeros(48 << 20, dtype=torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for turn in progress(range(passes + 1), "read"):
        for name, read in readers.items():
            began = time.process_time()
            for number in numbers:
                read(number, buffer)
            if turn:  # the first pass warms the page cache and the mappings
                seconds[name].append(time.process_time() - began)
    return seconds


def pack_rate(folder: Path, verify: str) -> float:
    """Return bytes per CPU second of assembling a 700k-token pack of real bytes in one buffer."""
    corpus = Corpus(DataConfig(paths=(str(folder),), tokens_per_pack=700_000, verify=verify))  # type: ignore[arg-type]
    lengths, indices = corpus.columns.lengths((1, 2, 2)), []
    for index in np.argsort(-lengths).tolist() * 64:
        if lengths[indices].sum() + lengths[index] <= 700_000:
            indices.append(index)
    buffer, rates = torch.zeros(128 << 20, dtype=torch.bfloat16), []
    for _ in range(PASSES):
        began = time.process_time()
        pack = read_pack(corpus, indices, (1, 2, 2), 700_000, 0, 0)
        count = copy([*pack.latents, *pack.text], buffer)
        rates.append(2 * count / (time.process_time() - began))
    return statistics.median(rates)


def open_seconds(folder: Path, count: int, per_shard: int = 100_000) -> tuple[float, float]:
    """Return (seconds to open a dataset of `count` samples, index bytes per sample); its .bin files hold nothing."""
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
    began = time.perf_counter()
    IndexedDataset(folder)
    return time.perf_counter() - began, size / count


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
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--open", type=int, default=0, help="also open a dataset of so many samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "dataset"
        write(folder)
        chosen = [name for name in arguments.methods if importlib.util.find_spec(METHODS[name][0].split(".")[0])]
        readers = {name: METHODS[name][1](folder) for name in chosen}
        table = Table(title=f"{SAMPLES} samples, CPU time, median of {arguments.passes} passes")
        for column in ("size", "method", "MB/s", "of memcpy"):
            table.add_column(column, justify="left" if column == "method" else "right")
        megabytes = np.array([np.prod(size) * 64 / 1e6 for size in sizes()])
        for low, high in ((0.0, 99.0), (0.0, 0.2), (0.2, 1.0), (1.0, 99.0)):
            numbers = np.flatnonzero((megabytes >= low) & (megabytes < high))
            numbers = np.random.default_rng(1).permutation(numbers)
            seconds = measure(readers, numbers.tolist(), arguments.passes)
            for name in chosen:
                ratio = statistics.median(a / b for a, b in zip(seconds["memcpy"], seconds[name], strict=True))
                rate = megabytes[numbers].sum() / statistics.median(seconds[name])
                table.add_row("all" if high - low > 50 and not low else f"{low:g}-{high:g}", name, f"{rate:,.0f}",
                              f"{ratio:.2f}")  # fmt: skip
        console = Console()
        console.print(table)
        for verify in ("never", "always"):
            console.print(f"700k-token pack, verify={verify}: {pack_rate(folder, verify) / 1e9:.2f} GB/s")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if arguments.open:
            seconds_open, per_sample = open_seconds(Path(root) / "many", arguments.open)
            memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            console.print(f"{arguments.open:,} samples opened in {seconds_open:.2f} s, {memory:.0f} MiB more memory")
            console.print(f"index: {per_sample:.0f} bytes a sample")


if __name__ == "__main__":
    main()
