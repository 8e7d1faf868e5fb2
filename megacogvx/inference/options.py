"""The options of `generate`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megacogvx.conversion.part import LIVE
from megacogvx.errors import ConfigError
from megacogvx.inference.answers import Answers
from megacogvx.inference.coding import add_coding_arguments
from megacogvx.inference.language_models import KEY_VARIABLE, Endpoint, LocalModel, check_local_model
from megacogvx.inference.load import EMA
from megacogvx.inference.outputs import TEXTS
from megacogvx.inference.prompt_upsampler import PromptUpsampler


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all of them, in groups."""
    _add_models(parser.add_argument_group("models"))
    _add_requests(parser.add_argument_group("what to make"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_upsampler(parser.add_argument_group("writing prompts out"))
    _add_outputs(parser.add_argument_group("files"))
    _add_layout(parser.add_argument_group("layout"))


def _add_models(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--checkpoint", type=Path, required=True,
        help="the transformer: a run folder (newest checkpoint), one of its checkpoints, what `convert` wrote, a "
        "diffusers folder, or a SAT release")  # fmt: skip
    add("--weights", choices=(LIVE, EMA), default=LIVE, help="ema: the moving average, if the run kept one")
    add("--vae", type=Path, help="the VAE that encoded its dataset, of any of these formats (default: the one in the "
        "same folder)")  # fmt: skip
    add("--text-encoder", type=Path, help="folder with tokenizer/ and text_encoder/ (T5; default: the one in the same "
        "folder)")  # fmt: skip


def _add_requests(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompt", action="append", default=[], help="what to show; may be given several times")
    add("--prompts-file", type=Path, help="text with one prompt a line, or .jsonl: an object a line with the keys "
        "prompt, seed, image, video, negative_prompt, steps, guidance_scale, strength")  # fmt: skip
    add("--image", type=Path, help="first frame, for an image-to-video model")
    add("--video", type=Path, help="video to start from: its first frames, at --fps")
    add("--video-as", choices=("start", "caption", "both"), default="start",
        help="start: noise the video to --strength and denoise it; caption: have a vision model describe it, and make "
        "a video of that text; both (default: start)")  # fmt: skip
    add("--strength", type=float, default=0.8,
        help="how much of the noise schedule a video goes through, in (0, 1]; 1 keeps nothing of it "
        "(default: 0.8)")  # fmt: skip
    add("--image-noise", type=float, default=0.0, metavar="SIGMA",
        help="noise on the image's pixels, in units of [-1, 1] (default: 0, as released)")  # fmt: skip
    add("--negative-prompt", help='what to steer away from; "" is the empty prompt (default: as the weights expect it)')
    add("--frames", type=int, help="frames to make, 8k + 1 (default: the model's native length)")
    add("--height", type=int, help="pixels, a multiple of 16 (default: the model's native size)")
    add("--width", type=int, help="pixels, a multiple of 16 (default: the model's native size)")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=int, default=50, help="sampling steps (default: 50)")
    add("--sampler", choices=("ddim", "dpm"),
        help="ddim: deterministic; dpm: stochastic, second order (default: as the weights expect)")  # fmt: skip
    add("--guidance-scale", type=float, default=6.0, help="classifier-free guidance; 1 turns it off (default: 6)")
    add("--guidance", choices=("constant", "monotone", "legacy"), default="constant",
        help="the scale over the steps; monotone: from 1 to 1 + scale; legacy: oscillating, as the released samplers' "
        "dynamic guidance does (default: constant)")  # fmt: skip
    add("--seed", type=int, default=0, help="of all noise (default: 0)")


def _add_upsampler(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--upsampler-url", metavar="URL", help="an endpoint of chat completions, e.g. http://localhost:8000/v1; its "
        f"key is read from {KEY_VARIABLE} (default: prompts go through unchanged)")  # fmt: skip
    add("--upsampler-model", metavar="NAME", help="the language model's name there")
    add("--upsampler-vision-model", metavar="NAME", help="the one that images and videos are shown to "
        "(default: the same)")  # fmt: skip
    add("--upsampler-folder", type=Path, metavar="DIR", help="a local language model, in place of an endpoint")
    add("--upsampler-timeout", type=float, default=60.0, metavar="SECONDS", help="for one answer (default: 60)")
    add("--upsampler-retries", type=int, default=2, metavar="N", help="after failures that may pass (default: 2)")
    add("--upsampler-failure", choices=("error", "unchanged"), default="error",
        help="stop, or go on with the prompt as it is (default: error)")  # fmt: skip


def _add_outputs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", type=Path, default=Path("samples"), help="folder for the videos (default: samples)")
    add("--fps", type=float, default=8.0, help="frames per second of the files (default: 8)")
    add("--png", action="store_true", help="write each frame as a PNG as well")
    add("--contact-sheet", action="store_true", help="write some frames of each video as one picture as well")
    add("--overwrite", action="store_true", help="make videos anew that are there with other settings")


def _add_layout(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    add("--tensor-parallel-size", type=int, default=1, help="ranks that share the linear layers (default: 1)")
    add("--context-parallel-size", type=int, default=1, help="ranks that share the tokens (default: 1)")
    add_coding_arguments(group)
    add("--vae-over-ranks", action="store_true", help="let the tensor and context ranks share each video's frames in "
        "the VAE: less memory, and faster for one long video (default: each codes whole videos)")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")


def endpoint_of(arguments: argparse.Namespace) -> Endpoint | None:
    """Return the endpoint that writes prompts out, or None.

    Raises:
        ConfigError: the options contradict each other, or the address is none.
    """
    if arguments.upsampler_url is None:
        return None
    if arguments.upsampler_folder is not None:
        raise ConfigError("--upsampler-url and --upsampler-folder name two language models; leave one out")
    if arguments.upsampler_model is None:
        raise ConfigError("--upsampler-url needs the name of the model there: --upsampler-model NAME")
    return Endpoint(
        arguments.upsampler_url, arguments.upsampler_model, arguments.upsampler_vision_model,
        arguments.upsampler_timeout, arguments.upsampler_retries,
    )  # fmt: skip


def upsampler_name(arguments: argparse.Namespace) -> str | None:
    """Return how the language model is called in the record of a video, None without one; loads nothing.

    Raises:
        ConfigError: the options contradict each other, the endpoint's address is none, or the folder holds no model.
    """
    if (endpoint := endpoint_of(arguments)) is not None:
        return endpoint.name
    if arguments.upsampler_folder is None:
        return None
    check_local_model(arguments.upsampler_folder)
    return str(arguments.upsampler_folder)


def upsampler_of(arguments: argparse.Namespace, device: torch.device) -> PromptUpsampler:
    """Return what writes prompts out; a local model is loaded here, onto `device`.

    Raises:
        ConfigError: the options contradict each other, or the local model can't be loaded.
    """
    folder, answers = arguments.upsampler_folder, Answers(arguments.output / TEXTS)
    if folder is None:
        return PromptUpsampler(endpoint_of(arguments), arguments.upsampler_failure, answers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return PromptUpsampler(LocalModel(folder, device, dtype), arguments.upsampler_failure, answers)
