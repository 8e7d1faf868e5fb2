"""Short prompts to the long captions that the model was trained on (CogVideoX, appendix E), by a language model.

The models are those of `language_models.py`. One with vision is also shown the first frame of image to video, or frames
of a video that is to be described (appendix H: caption, then generate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from megacogvx.errors import ConfigError, EndpointError, MegacogvxError
from megacogvx.inference.answers import Answers, Question, digest
from megacogvx.log import get_logger

_RULES = """\
Write one paragraph of plain English, 60 to 120 words, in the present tense, as if describing a finished video to
someone who cannot see it. Say who or what is seen and how they look, what they do and in which order, where it
happens, the light and the mood, and how the camera moves. Keep everything that was asked for, change nothing of it, and
add only details that fit. If the request corrects an earlier description, write a whole new one with the correction
worked in, not the old one made longer. Answer with that paragraph alone: one description, no title, list, quotation
marks or remarks."""
INSTRUCTIONS = {
    "text": "You prepare prompts for a model that makes videos and was trained on long, factual captions. You are "
    f"given a short idea for a video; turn it into such a caption.\n{_RULES}",
    "image": "You prepare prompts for a model that continues a picture as a video and was trained on long, factual "
    "captions. You are given the picture, which is the video's first frame, and maybe an idea of what happens next; "
    f"write the caption of the whole video. It must begin with what the picture shows.\n{_RULES}",
    "video": "You write captions for a model that makes videos from text. You are given frames of a video in their "
    "order, and maybe a wish; write the caption from which the same video, with that wish fulfilled, could be made.\n"
    f"{_RULES}",
}
Kind = Literal["text", "image", "video"]
logger = get_logger(__name__)


class Writer(Protocol):
    """A language model: an instruction, a text and uint8 pictures `[H, W, 3]` to an answer."""

    @property
    def name(self) -> str:
        """What stands in the record of a video."""

    def write(self, instruction: str, text: str, pictures: Sequence[torch.Tensor] = ()) -> str:
        """Return the answer; a `MegacogvxError` tells why there is none."""


@dataclass(frozen=True)
class PromptUpsampler:
    """Upsamples prompts; one that fails is an error, or goes through unchanged.

    Attributes:
        writer: the language model; None: every prompt goes through unchanged.
        on_failure: what to do when the model doesn't answer.
        answers: what it answered before; the same question gets the same text.
    """

    writer: Writer | None = None
    on_failure: Literal["error", "unchanged"] = "error"
    answers: Answers = field(default_factory=Answers)

    def text(self, prompt: str) -> str:
        """Return the long form of a prompt."""
        return self._ask("text", prompt)

    def image(self, prompt: str, image_HW3: torch.Tensor) -> str:
        """Return the long form of a prompt whose video begins with an image."""
        return self._ask("image", prompt, [image_HW3])

    def video(self, prompt: str, frames: Sequence[torch.Tensor]) -> str:
        """Return a caption of a video from some of its frames `[H, W, 3]`, changed as the prompt wishes.

        Raises:
            ConfigError: there is no language model, and no prompt either.
        """
        if self.writer is None and not prompt:
            raise ConfigError("a video can only be described by a vision model; name one, or give a --prompt")
        return self._ask("video", prompt, frames)

    def _ask(self, kind: Kind, prompt: str, pictures: Sequence[torch.Tensor] = ()) -> str:
        if self.writer is None:
            return prompt
        question = Question(self.writer.name, kind, prompt, tuple(digest(picture) for picture in pictures))
        if (known := self.answers.get(question)) is not None:
            return known
        try:
            answer = self.writer.write(INSTRUCTIONS[kind], prompt, pictures).strip().strip('"').strip()
            if not answer:
                raise EndpointError(f"{self.writer.name} answered nothing for the prompt {prompt!r}")
        except MegacogvxError as error:
            if self.on_failure == "error" or not prompt:
                raise
            logger.warning("the prompt %r goes on unchanged: %s", prompt, error)
            return prompt
        self.answers.keep(question, answer)
        logger.info("prompt %r was written out as %r", prompt, answer)
        return answer
