"""What is asked for: prompts of the command line and of files, and what each may say for itself.

A prompts file is text, one prompt a line, or JSONL (its name ends in .jsonl), one `Request` a line:

    {"prompt": "a dog runs along a beach", "seed": 7, "image": "dog.png", "steps": 30}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from megacogvx.config import Section, build_config
from megacogvx.errors import ConfigError
from megacogvx.inference.denoise import SamplingSettings


class Request(Section):
    """One line of a JSONL file; what it leaves out is as the options say.

    Attributes:
        prompt: what to show; may be left out where a caption of the video is to be it.
        image: the first frame, for an image-to-video model; relative to the folder of the file.
        video: what to start from, or what to describe; relative to the folder of the file.
        negative_prompt: what to steer away from.
        seed: of all noise. A request with a seed of its own gives the same video in any file and at any line.
        steps, guidance_scale, strength: of `SamplingSettings`.
    """

    prompt: str = ""
    image: Path | None = None
    video: Path | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Job:
    """One video to make.

    Attributes:
        name: stem of its files.
        place: its number among the videos of its seed; decides its noise.
        prompt: as the user wrote it.
        image, video: what it starts from.
        negative_prompt: None: what stands for no prompt in the weights' training.
        settings: of the sampling loop.
    """

    name: str
    place: int
    prompt: str
    settings: SamplingSettings
    image: Path | None = None
    video: Path | None = None
    negative_prompt: str | None = None


def read_jobs(
    prompts: Sequence[str],
    file: Path | None,
    settings: SamplingSettings,
    image: Path | None = None,
    video: Path | None = None,
    negative_prompt: str | None = None,
) -> list[Job]:
    """Return a job for each prompt of the command line, then for each line of the file.

    Args:
        prompts: of the command line.
        file: text or JSONL; empty lines are left out.
        settings, image, video, negative_prompt: for every request that doesn't say otherwise.

    Raises:
        ConfigError: there is nothing to do, or the file or one of its lines can't be read.
    """
    requests = [*(Request(prompt=prompt) for prompt in prompts), *read_requests(file)]
    if not requests and video is not None:
        requests = [Request()]
    if not requests:
        raise ConfigError(
            "there is no prompt; give --prompt TEXT, or --prompts-file with one prompt a line, or a --video to describe"
        )
    common = Request(image=image, video=video, negative_prompt=negative_prompt)
    return [_job(number, _filled(request, common), settings) for number, request in enumerate(requests)]


def read_requests(file: Path | None) -> list[Request]:
    """Return the requests of a file; none for None.

    Raises:
        ConfigError: it can't be read; a line isn't a JSON object, or has an unknown key (the nearest is suggested).
    """
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").split("\n")]  # nothing else ends a line
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {file} can't be read: {error}") from None
    if file.suffix != ".jsonl":
        return [Request(prompt=line) for line in lines if line]
    return [_parse(line, f"{file}, line {number}", file.parent) for number, line in enumerate(lines, 1) if line]


def _parse(line: str, source: str, folder: Path) -> Request:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{source} is not JSON ({error}); a line of a .jsonl file is one object") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{source} must be an object such as {{"prompt": "a dog"}}, not a {type(values).__name__}')
    request = build_config(Request, values, source)
    paths = {name: folder / path for name in ("image", "video") if (path := getattr(request, name)) is not None}
    return request.model_copy(update=paths)


def _filled(request: Request, common: Request) -> Request:
    """Return the request with what it leaves out taken from the options."""
    missing = {name: value for name, value in common if value is not None and getattr(request, name) is None}
    return request.model_copy(update=missing)


def _job(number: int, request: Request, settings: SamplingSettings) -> Job:
    changes: dict[str, Any] = {
        "seed": request.seed, "num_steps": request.steps, "guidance_scale": request.guidance_scale,
        "strength": request.strength,
    }  # fmt: skip
    settings = replace(settings, **{name: value for name, value in changes.items() if value is not None})
    place = number if request.seed is None else 0
    return Job(
        f"sample-{number:03d}", place, request.prompt, settings, request.image, request.video, request.negative_prompt
    )
