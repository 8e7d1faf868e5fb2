"""The language models that may write prompts out: behind an endpoint, or in a local folder.

An endpoint speaks OpenAI's chat completions; its key is read from the environment, and sent nowhere else. A folder is
one of transformers'; nothing is downloaded. Given pictures, the model has to be one with vision.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image

from megacogvx.errors import ConfigError, EndpointError
from megacogvx.log import get_logger

KEY_VARIABLE = "MEGACOGVX_UPSAMPLER_KEY"  # a name of our own: another service's key must not reach this endpoint
LONGEST_ANSWER = 1 << 20  # bytes
PICTURE_SIDE = 768  # pixels of the longer side of a picture that is sent
PASSING = (408, 429, 500, 502, 503, 504)  # answers of HTTP after which asking again may help
MOST_TOKENS = 400  # of an answer; the text encoder reads 226

logger = get_logger(__name__)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses to follow: the key would go to an address that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        """Return None: what came is an error."""


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Endpoint:
    """A chat-completions endpoint.

    Attributes:
        url: up to and without `/chat/completions`, e.g. `http://localhost:8000/v1`.
        model: its name there.
        vision_model: the one that pictures are shown to; None: the same.
        timeout: seconds for one whole answer.
        retries: how often to ask again after a failure that may pass.
        pause: seconds before the first of them; doubled each time.
    """

    url: str
    model: str
    vision_model: str | None = None
    timeout: float = 60.0
    retries: int = 2
    pause: float = 1.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for what can't be an endpoint."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the endpoint {self.url!r} must be an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"the endpoint at {parts.hostname} must be an address alone, such as http://localhost:8000/v1; its key "
                f"is read from {KEY_VARIABLE}"
            )
        if not self.timeout > 0 or self.retries < 0:
            raise ConfigError(f"timeout={self.timeout} seconds must be positive and retries={self.retries} not below 0")

    @property
    def name(self) -> str:
        """Models and host; the path may hold what only the caller should know."""
        parts = urlsplit(self.url)
        models = " and ".join(dict.fromkeys((self.model, self.vision_model or self.model)))
        return f"{models} at {parts.scheme}://{parts.netloc}"

    def write(self, instruction: str, text: str, pictures: Sequence[torch.Tensor] = ()) -> str:
        """Ask the model.

        Raises:
            EndpointError: it can't be reached, is too slow, refuses, or doesn't answer with chat completions.
        """
        body = json.dumps(self._question(instruction, text, pictures)).encode()
        pause, reason = self.pause, ""
        for attempt in range(self.retries + 1):
            if attempt:
                logger.warning("%s: %s; asking again in %g s", self.name, reason, pause)
                time.sleep(pause)
                pause *= 2
            try:
                return _answer_of(self._post(body), self.name)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}: {_shortened(error)}"
                if error.code not in PASSING:
                    raise EndpointError(f"{self.name} refuses: {reason}") from None
            except TimeoutError:
                reason = f"no whole answer within {self.timeout:g} s"
            except (OSError, HTTPException) as error:
                reason = f"can't be reached: {getattr(error, 'reason', None) or error}"
        raise EndpointError(
            f"{self.name}: {reason}, after {self.retries + 1} attempts; start the endpoint, raise its time limit, or "
            "let prompts go on unchanged"
        )

    def _question(self, instruction: str, text: str, pictures: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return a request for chat completions."""
        content: Any = text
        if pictures:
            shown = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
            content = [{"type": "text", "text": text or "There is no wish."}, *shown]
        return {
            "model": (self.vision_model or self.model) if pictures else self.model,
            "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": content}],
            "max_tokens": MOST_TOKENS,
        }

    def _post(self, body: bytes) -> bytes:
        """Send one request and return its answer; the time limit holds for all of it, not for each read."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        end = time.monotonic() + self.timeout
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return self._read(response, end)
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TimeoutError from None
            raise

    def _read(self, response: HTTPResponse, end: float) -> bytes:
        answer = b""
        while part := response.read1(1 << 16):
            answer += part
            if time.monotonic() > end:
                raise TimeoutError
            if len(answer) > LONGEST_ANSWER:
                raise EndpointError(f"{self.name} answers with more than {LONGEST_ANSWER} bytes; is it one?")
        return answer


class LocalModel:
    """A causal or vision language model in a local folder of transformers'; nothing is downloaded.

    Args:
        folder: config.json, safetensors, tokenizer, and for vision the processor's files.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ConfigError: the folder doesn't hold such a model.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        import transformers

        self.name = str(folder)
        check_local_model(folder)
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            self.has_vision = hasattr(config, "vision_config")
            models, processors = (
                (transformers.AutoModelForImageTextToText, transformers.AutoProcessor)
                if self.has_vision
                else (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
            )
            self._processor = processors.from_pretrained(folder, local_files_only=True)
            model = models.from_pretrained(folder, local_files_only=True, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"the local language model {folder} can't be loaded: {error}") from None
        self._model = model.to(device).eval()

    @torch.no_grad()
    def write(self, instruction: str, text: str, pictures: Sequence[torch.Tensor] = ()) -> str:
        """Let the model answer, always choosing the likeliest token.

        Raises:
            ConfigError: pictures for a model without vision.
        """
        if pictures and not self.has_vision:
            raise ConfigError(
                f"{self.name} sees no pictures; name a vision model for image to video and for captions of videos"
            )
        inputs = self._inputs(instruction, text, [_picture(picture) for picture in pictures]).to(self._model.device)
        tokens = self._model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.decode(answer, skip_special_tokens=True))

    def _inputs(self, instruction: str, text: str, pictures: list[Image.Image]) -> Any:
        if not getattr(self._processor, "chat_template", None):  # a model without a format of its own for turns
            if pictures:
                raise ConfigError(f"{self.name} has no chat template, which pictures need")
            return self._processor(f"{instruction}\n\nIdea: {text}\n\nCaption:", return_tensors="pt")
        content: Any = f"{instruction}\n\n{text}"
        if self.has_vision:
            content = [{"type": "image", "image": picture} for picture in pictures] + [
                {"type": "text", "text": content}
            ]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip


def check_local_model(folder: Path) -> None:
    """Raise `ConfigError` when a folder can't hold a local language model; nothing is loaded."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; a local language model is a folder of transformers'")


def data_url(image_HW3: torch.Tensor) -> str:
    """Return a uint8 picture as a base64 data URL (JPEG), its longer side at most `PICTURE_SIDE` pixels."""
    file = io.BytesIO()
    _picture(image_HW3).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _picture(image_HW3: torch.Tensor) -> Image.Image:
    picture = Image.fromarray(image_HW3.contiguous().numpy())
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture


def _answer_of(body: bytes, name: str) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise EndpointError(f"{name} doesn't answer with chat completions, but with {body[:200]!r}") from None
    if not isinstance(content, str):
        raise EndpointError(f"{name} answers with {type(content).__name__} in place of a text")
    return content


def _shortened(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(200).decode(errors="replace")
    except OSError:
        return ""
