"""IndexedDataset: records of a dataset as torch tensors that view the mapped files, without a copy.

Shapes and offsets come from the index columns alone. Tensors keep their mapping alive, so they may outlive the dataset;
writing into one changes a private copy of the page, never the file. On network file systems `pread` copies instead: a
file that is cut or a server that hangs is then an error of one read, not of the process. A dataset at a URL is read by
range requests (`remote.py`), its indexes once, when it is opened.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.manifest import MANIFEST, Manifest, ShardEntry, differing_keys, read_manifest
from megacogvx.data.indexed.record import Record
from megacogvx.data.indexed.remote import Folder, folder_at
from megacogvx.data.indexed.shard import Allocate, Shard, Verify
from megacogvx.data.indexed.side_columns import read_side_column
from megacogvx.data.indexed.source import Access
from megacogvx.errors import DataError

OPENED_AT_ONCE = 16  # indexes that are read side by side, from an object store or where there are many
OPEN_SHARDS = 256  # .bin files that are open at a time: a process may often open 1,024, and map 65,530


class IndexedDataset:
    """A finished dataset: `len`, columns, and records by number in manifest order.

    Attributes:
        manifest: its manifest; `manifest.encoder` says what made the records.
    """

    def __init__(self, folder: Folder | str, verify: Verify = "always", access: Access = "mmap") -> None:
        """Open the dataset in `folder`, a path or a URL; reads only the indexes.

        Args:
            folder: that holds manifest.json.
            verify: compare checksums at every read, at the first read of each sample, or never.
            access: map the files, or read from them; files at a URL are always read.

        Raises:
            DataError: a file is missing, truncated, damaged or doesn't belong here.
        """
        self.folder, self.verify = folder_at(folder), verify
        self.manifest: Manifest = read_manifest(self.folder)
        self.shards = self._open_shards(access)
        for shard in self.shards:
            differing = differing_keys(self.encoder, shard.index.encoder)
            if differing:
                raise DataError(
                    f"{self.folder}: {MANIFEST} and shard {shard.name} name different encoders: {differing}"
                )
        self._starts = np.cumsum([0, *(len(shard.index) for shard in self.shards)]).tolist()
        self._used: dict[str, Shard] = {}  # the shards whose .bin may be open, the longest unused first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def encoder(self) -> EncoderInfo:
        """What made the records."""
        return self.manifest.encoder

    @cached_property
    def sample_id(self) -> np.ndarray:
        """Keys of the samples, uint64 `[n]`."""
        return self._column("sample_id", np.uint64)

    @cached_property
    def frames(self) -> np.ndarray:
        """Latent frames of the samples, int64 `[n]`."""
        return self._column("frames", np.int64)

    @cached_property
    def height(self) -> np.ndarray:
        """Latent rows of the samples, int64 `[n]`."""
        return self._column("height", np.int64)

    @cached_property
    def width(self) -> np.ndarray:
        """Latent columns of the samples, int64 `[n]`."""
        return self._column("width", np.int64)

    @cached_property
    def text_length(self) -> np.ndarray:
        """Text tokens of the samples, int64 `[n]`."""
        return self._column("text_length", np.int64)

    def sample(self, number: int, frames: range | None = None, first_frame: bool = False) -> Record:
        """Return sample `number`; `frames` limits the latents to these latent frames (and to their bytes on disk).

        The pixels of the first frame are read only where `first_frame` asks for them.

        Raises:
            DataError: the sample is damaged; names its shard and id.
        """
        shard, row = self._open(number)
        return shard.record(row, frames, first_frame)

    def metadata(self, number: int) -> dict[str, Any]:
        """Return the metadata of sample `number`, without reading its tensors.

        Raises:
            DataError: they are damaged; names the shard and the sample.
        """
        shard, row = self._open(number)
        return shard.metadata(row)

    def has_first_frame(self) -> np.ndarray:
        """Return which samples hold their first frame: bool `[n]`."""
        if not self.encoder.first_frame:
            return np.zeros(len(self), bool)
        return self._column("image_offset", np.uint64) > 0

    def first_frame_sizes(self) -> np.ndarray:
        """Return height and width of the first frames in pixels, int64 `[2, n]`; zeros where there is none."""
        if not self.encoder.first_frame:
            return np.zeros((2, len(self)), np.int64)
        return np.stack([self._column(name, np.int64) for name in ("image_height", "image_width")])

    def sample_in(
        self, allocate: Allocate, number: int, frames: range | None = None, first_frame: bool = False
    ) -> Record:
        """Return `sample(number, frames, first_frame)` in memory that `allocate` gives, pinned say: one copy.

        Raises:
            DataError: the sample is damaged; names its shard and id.
        """
        shard, row = self._open(number)
        return shard.record_in(allocate, row, frames, first_frame)

    def read_into(self, number: int, out: np.ndarray, frames: range | None = None) -> int:
        """Copy sample `number` into `out`: latents from byte 0 on, text from the next multiple of 64; the fast way.

        The sizes are those of the columns `frames`, `height`, `width`, `text_length`; nothing else is returned.

        Args:
            number: of the sample.
            out: uint8 `[n]`, contiguous and large enough; `tensor.view(torch.uint8).numpy()` of a pinned tensor, say.
            frames: limits the latents to these latent frames.

        Returns:
            Bytes of `out` that are taken, a multiple of 64.

        Raises:
            DataError: the sample is damaged; names its shard and id. `out` may hold a part of it then.
        """
        shard, row = self._open(number)
        return shard.copy(row, frames, out)

    def side_column(self, name: str) -> np.ndarray:
        """Return the newest generation of a side column: float32 `[n]`, NaN where a sample has no value.

        Raises:
            DataError: there is none of this name, it is damaged, or of other samples.
        """
        return read_side_column(self.folder, name, self.sample_id)

    def locate(self, number: int) -> tuple[Shard, int]:
        """Return the shard that holds sample `number`, and its row there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)} in {self.folder}")
        place = bisect_right(self._starts, number) - 1
        return self.shards[place], number - self._starts[place]

    def _open(self, number: int) -> tuple[Shard, int]:
        """Return `locate(number)`, and close the shard that is longest unused where too many would be open."""
        shard, row = self.locate(number)
        if len(self.shards) > OPEN_SHARDS:
            with self._lock:
                self._used.pop(shard.name, None)
                self._used[shard.name] = shard
                if len(self._used) > OPEN_SHARDS:
                    self._used.pop(next(iter(self._used))).close()
        return shard, row

    def _open_shards(self, access: Access) -> list[Shard]:
        def open_shard(entry: ShardEntry) -> Shard:
            return Shard(self.folder, entry.name, self.verify, entry, access)

        if isinstance(self.folder, Path) and len(self.manifest.shards) <= OPEN_SHARDS:
            return [open_shard(entry) for entry in self.manifest.shards]
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            return list(pool.map(open_shard, self.manifest.shards))

    def _column(self, name: str, dtype: type) -> np.ndarray:
        columns: list[np.ndarray] = [shard.index.columns[name].astype(dtype) for shard in self.shards]
        return np.concatenate([np.empty(0, dtype), *columns])
