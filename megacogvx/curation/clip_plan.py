"""Which clips a caption file gives: planned once, by all processes of an encoding together, kept beside the dataset.

Each video has to be opened to learn its size and length; with millions of them, and hundreds of processes, no process
can do that for all. So the file is parts of `PART` rows. A process plans the parts of its share, then those that no
other has finished or is at work on: tasks that start later, or never, hold nobody up, and a restart goes on.

    DATASET/clip-plan-KEY/000012.safetensors   sample_ids u64 [n], clips: a JSON line each, as u8; left out: metadata

KEY stands for the caption file (name, size, time of change), the videos' folder and the rules.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from megacogvx.curation.captions import caption_rows, check_rows
from megacogvx.curation.clip import ClipRules, plan_all
from megacogvx.curation.clip_list import PART, ClipList, Part, sample_id
from megacogvx.data.clips import Clip
from megacogvx.data.indexed.durable import try_lock, write_atomically, writing
from megacogvx.data.transforms import Size
from megacogvx.errors import DataError
from megacogvx.log import get_logger

POLL_SECONDS = 1.0  # between two looks at what others are doing
SAID_EVERY = 60  # looks
LOOKED_AT = 8  # unfinished parts whose locks are tried at each look

logger = get_logger(__name__)


class PlannedClip(Clip):
    """A clip that is a part of a video, and no file of its own.

    Attributes:
        resized: (height, width) that its frames are resized to before the crop.
        source_bytes: size of the video's file when it was looked into.
    """

    resized: Size
    source_bytes: int


@dataclass(frozen=True)
class ClipPlan:
    """What is planned: the rows of `captions`, which are of files in `videos`, for a dataset in `output`."""

    captions: Path
    videos: Path
    output: Path
    rules: ClipRules
    skip_bad: bool

    @property
    def folder(self) -> Path:
        """Where the parts are kept."""
        try:
            file = self.captions.stat()
        except OSError as error:
            raise DataError(f"caption file {self.captions}: {error.strerror}") from None
        facts = (self.captions.name, file.st_size, file.st_mtime_ns, self.videos, astuple(self.rules), self.skip_bad)
        return self.output / f"clip-plan-{xxhash.xxh3_64_hexdigest(repr(facts).encode())}"

    def part(self, rows: Sequence[tuple[int, Any]]) -> bytes:
        """Plan some rows: return the bytes of their file.

        Raises:
            DataError: a row breaks a rule; unless bad ones are skipped, also a video that is missing or damaged, or a
                part of it that lies beyond its end.
        """
        skipped: Counter[str] = Counter()
        captions = check_rows(self.captions, rows)
        plan = plan_all(captions, self.videos, self.output, self.rules, self.skip_bad, skipped)
        clips = [
            PlannedClip(**cut.clip.model_dump(), resized=cut.resized, source_bytes=cut.source_bytes)
            for cuts in plan
            for cut in cuts
        ]
        lines = "".join(
            json.dumps({**clip.model_dump(), "path": clip.path.name}, ensure_ascii=False) + "\n" for clip in clips
        )
        ids = np.fromiter(map(sample_id, clips), np.uint64, len(clips))
        text = np.frombuffer(lines.encode(), np.uint8)
        return save({"sample_ids": ids, "clips": text}, {"rows": str(len(rows)), "left_out": json.dumps(skipped)})

    def read(self, path: Path) -> list[PlannedClip]:
        """Return the clips of a part's file."""
        rows = map(json.loads, _tensor(path, "clips").tobytes().splitlines())
        return [PlannedClip(**{**row, "path": self.output / row["path"]}) for row in rows]


def plan_clips(plan: ClipPlan, rank: int, ranks: int) -> ClipList:
    """Return the clips of all rows; every process of an encoding calls this, at any time.

    Args:
        plan: the same for all.
        rank, ranks: this process's share of the videos to look into.

    Raises:
        DataError: as `ClipPlan.part`; or there is no row, or none that gives a clip.
    """
    folder = plan.folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    parts = _plan_parts(plan, folder, rank, ranks)
    if not parts:
        raise DataError(f"caption file {plan.captions} holds no row")
    left_out: Counter[str] = Counter()
    rows, ids = 0, []
    for path in parts:
        facts = _metadata(path)
        left_out.update(json.loads(facts["left_out"]))
        rows += int(facts["rows"])
        ids.append(_tensor(path, "sample_ids"))
    for reason, count in sorted(left_out.items()):
        logger.info("left out: %d x %s", count, reason)
    if not any(map(len, ids)):
        raise DataError(f"{plan.captions}: no clip comes of {rows} captions; left out: {dict(left_out)}")
    return ClipList([Part(keys, partial(plan.read, path)) for keys, path in zip(ids, parts, strict=True)])


def _plan_parts(plan: ClipPlan, folder: Path, rank: int, ranks: int) -> list[Path]:
    """Plan this process's share, then what is left; return the files of all parts, which are there then."""
    number = _pass_over(plan, folder, range(rank, 2**63 - 1, ranks))
    paths = [_path(folder, part) for part in range(number)]
    waits = 0
    while missing := [part for part, path in enumerate(paths) if not path.is_file()]:
        first = (rank + waits) * LOOKED_AT
        looked_at = (missing[place % len(missing)] for place in range(first, first + min(LOOKED_AT, len(missing))))
        if any(_is_free(folder, part) for part in looked_at):
            _pass_over(plan, folder, set(missing))
            continue
        if waits % SAID_EVERY == 0:
            logger.info("waiting for %d of %d parts of the plan, at which others are at work", len(missing), number)
        time.sleep(POLL_SECONDS)
        waits += 1
    return paths


def _pass_over(plan: ClipPlan, folder: Path, wanted: Container[int]) -> int:
    """Plan those of the `wanted` parts that nobody has finished or is at work on; return how many parts there are."""
    number = 0
    for number, rows in enumerate(_batches(caption_rows(plan.captions)), start=1):
        if number - 1 in wanted:
            _write_once(_path(folder, number - 1), partial(plan.part, rows))
    return number


def _write_once(path: Path, content: Callable[[], bytes]) -> None:
    """Write a file unless it is there, or another process is about to write it."""
    lock = path.with_suffix(".lock")
    with writing(path.parent), lock.open("ab") as file:
        if try_lock(file):
            if not path.is_file():
                write_atomically(path, content())
            lock.unlink(missing_ok=True)


def _is_free(folder: Path, number: int) -> bool:
    """Whether no process is at work on a part."""
    try:
        with _path(folder, number).with_suffix(".lock").open("rb+") as file:  # NFS locks what may be written
            return try_lock(file)
    except FileNotFoundError:
        return True


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, PART)):
        yield batch


def _tensor(path: Path, name: str) -> np.ndarray:
    try:
        with safe_open(path, "np") as file:
            return np.asarray(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read ({error}); remove {path.parent} and start again") from None


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read ({error}); remove {path.parent} and start again") from None
