"""Caption files: which image, or part of a video, shows what. JSON Lines, CSV or Parquet with the same columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from megacogvx.config import Section
from megacogvx.errors import DataError

PARQUET_ROWS = 4096  # held at a time


class Caption(Section):
    """One row of a caption file.

    Attributes:
        video: file name of the video, relative to the folder of videos; or `image`, a picture's.
        caption: what is seen, in words.
        start, end: seconds; the part of the video that the caption describes.
        image_at: seconds; the row is the single frame shown then, instead of a part.
    """

    video: str = Field(min_length=1)
    caption: str = Field(min_length=1)
    start: float = Field(0.0, ge=0, allow_inf_nan=False)
    end: float | None = Field(None, gt=0, allow_inf_nan=False)
    image_at: float | None = Field(None, ge=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _image(cls, values: Any) -> Any:
        """A picture is a video of one frame."""
        if not isinstance(values, dict) or "image" not in values:
            return values
        if set(values) & {"video", "start", "end", "image_at"}:
            raise ValueError("image stands instead of video, start, end and image_at")
        return {**{name: value for name, value in values.items() if name != "image"}, "video": values["image"],
                "image_at": 0.0}  # fmt: skip

    @model_validator(mode="after")
    def _agree(self) -> Caption:
        if Path(self.video).is_absolute() or ".." in Path(self.video).parts:
            raise ValueError(f"video={self.video!r} leads out of the folder of videos")
        if self.image_at is None and self.end is None:
            raise ValueError("a row needs start and end, or image_at, in seconds")
        if self.image_at is not None and (self.end is not None or self.start):
            raise ValueError("image_at stands instead of start and end, not beside them")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end={self.end} must be later than start={self.start}")
        return self


def read_captions(path: Path) -> list[Caption]:
    """Read a caption file; `.csv` is CSV with a heading line, `.parquet` Parquet, everything else JSON Lines.

    Raises:
        DataError: the file is missing, empty, damaged or not UTF-8, or a row breaks a rule; such rows are named by
            line (of Parquet: by row, from 1 on).
    """
    captions = check_rows(path, caption_rows(path))
    if not captions:
        raise DataError(f"caption file {path} holds no row")
    return captions


def caption_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, row) of a caption file as they stand there, unchecked and one at a time.

    Raises:
        DataError: the file is missing, damaged or not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"caption file {path} does not exist")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    return _csv_rows(path) if suffix == ".csv" else _json_rows(path)


def check_rows(path: Path, rows: Iterable[tuple[int, Any]]) -> list[Caption]:
    """Return rows of the caption file `path` as captions.

    Raises:
        DataError: rows break a rule; up to ten are named.
    """
    captions, problems = [], []
    for number, row in rows:
        try:
            captions.append(Caption(**_mapping(row)))
        except ValidationError as error:
            problems += [f"line {number}: {_explain(problem)}" for problem in error.errors()]
        except (ValueError, TypeError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"caption file {path}: {'; '.join(problems[:10])}{more}")
    return captions


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines with their ends."""
    offset, codec = 0, "utf-8-sig"  # spreadsheets write a byte order mark
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode(codec)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"caption file {path}: line {number} is not UTF-8 ({error.reason} at byte {offset + error.start} "
                    "of the file); save it as UTF-8"
                ) from None
            offset, codec = offset + len(line), "utf-8"


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"caption file {path}: reading Parquet needs pyarrow (pip install 'megacogvx[lists]')"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_ROWS):
                for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020  it counts on
                    yield number, {name: value for name, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"caption file {path} is not readable as Parquet: {error}") from None


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    return ((number, line) for number, line in enumerate(_lines(path), start=1) if line.strip())


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(_csv_lines(path), strict=True)
    try:
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise DataError(f"caption file {path}: line {reader.line_num}: {error}") from None


def _csv_lines(path: Path) -> Iterator[str]:
    """Yield the lines, also where a carriage return alone ends them, as old spreadsheets write."""
    for line in _lines(path):
        yield from io.StringIO(line, newline="") if "\r" in line else (line,)


def _mapping(row: Any) -> dict[str, Any]:
    row = json.loads(row) if isinstance(row, str) else row
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        raise ValueError("a row must be an object with video, caption, start and end (or image_at)")
    return row


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    known = ", ".join([*Caption.model_fields, "image"])
    if problem["type"] == "extra_forbidden":
        return f"unknown column {name}; known: {known}"
    return f"{name}: {problem['msg']}" if name else problem["msg"].removeprefix("Value error, ")
