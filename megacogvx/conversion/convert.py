"""The verb `convert`: a checkpoint of one format to another, streaming; nothing but one tensor is held in memory.

Everything is opened and checked before anything is written. The output is written beside and renamed at the end, after
every tensor has been read back and compared bit by bit.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from megacogvx.conversion import diffusers, megacogvx, sat
from megacogvx.conversion.lora import Adapter, merge
from megacogvx.conversion.part import DTYPES, KINDS, LIVE, Kind, Part, ReadOptions
from megacogvx.conversion.settings import VARIANTS, VAESettings
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.log import get_logger, progress

EXAMPLE = """\
example:
  megacogvx convert CogVideoX-5b --to megacogvx --output runs/5b
  megacogvx convert runs/pretrain runs/vae --to diffusers --text-encoder t5-v1_1-xxl --dtype bf16 --output CogVideoX
  megacogvx convert CogVideoX-2b-sat --to diffusers --lora adapters/style --output CogVideoX-2b-style

A source is a diffusers folder, a SAT release (transformer/latest, vae/3d-vae.pt) or one of its files, or a run folder
or checkpoint of ours; which one is seen from what lies in it. Several are put together.
"""

FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (diffusers, sat, megacogvx)}
PARTIAL = ".partial"
SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
TEXT_FOLDERS = ("tokenizer", "text_encoder")

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    add = parser.add_argument
    add("sources", type=Path, nargs="+", metavar="SOURCE", help="what to convert: transformer and VAE, or one of them")
    add("--to", choices=list(FORMATS), required=True, help="format to write")
    add("--output", type=Path, required=True, help="folder to make; it must not be there yet")
    add("--dtype", choices=list(DTYPES), help="of the written weights (default: as they are)")
    add(
        "--weights",
        default=LIVE,
        help="of the transformer, if any: live, or a set kept beside, such as ema (default: live)",
    )
    add("--variant", choices=list(VARIANTS), help="SAT: which released model it is (default: by its shapes)")
    add("--config", type=Path, help="SAT: YAML that describes another model (sections model, diffusion, encoder, vae)")
    add("--drop-foreign", action="store_true", help="SAT: leave out tensors of other models, which a trained file has")
    add("--lora", type=Path, action="append", default=[], help="LoRA adapter (PEFT) to merge; may be given again")
    add("--lora-scale", type=float, default=1.0, help="multiplies the adapters' own scale (default: 1)")
    add("--text-encoder", type=Path, help="folder with tokenizer/ and text_encoder/ (default: the source's, if any)")
    add("--text-encoder-as", choices=("copy", "link", "none"), default="copy", help="how it gets there (default: copy)")
    add("--max-shard-size", default="5GB", help="of diffusers' files, such as 5GB or 500MB (default: 5GB)")
    add("--no-check", action="store_true", help="don't read the output back and compare it")


def run(arguments: argparse.Namespace) -> None:
    """Convert.

    Raises:
        ConfigError: options contradict each other or the sources; said before anything is written.
        CheckpointError: a source is damaged, incomplete, of another model, or can't be written in this format.
    """
    options = ReadOptions(arguments.weights, arguments.variant, arguments.config, arguments.drop_foreign)
    parts = open_parts(arguments.sources, options)
    parts = merged_and_cast(parts, arguments.lora, arguments.lora_scale, arguments.dtype)
    text = text_encoder_folder(arguments.text_encoder, arguments.sources, arguments.text_encoder_as)
    convert(
        parts, arguments.to, arguments.output,
        max_shard_bytes=shard_bytes(arguments.max_shard_size),
        text_encoder=text, link_text_encoder=arguments.text_encoder_as == "link", check=not arguments.no_check,
    )  # fmt: skip


def open_parts(sources: Sequence[Path], options: ReadOptions) -> dict[Kind, Part]:
    """Open every model that the sources hold, and check names, shapes and settings; no weights are read.

    Raises:
        CheckpointError: a source is of no known format, damaged, or incomplete.
        ConfigError: two sources hold the same kind of model, or they don't fit together.
    """
    found: dict[Kind, tuple[ModuleType, Path]] = {}
    for source in sources:
        for kind, place in find_models(source).items():
            if kind in found:
                raise ConfigError(f"{found[kind][1]} and {place[1]} both hold a {kind}; name one")
            found[kind] = place
    parts = {}
    for kind, (module, path) in found.items():
        # A VAE beside a transformer is a finished one.
        asked = options if kind == "transformer" or "transformer" not in found else replace(options, weights=LIVE)
        parts[kind] = module.open_part(kind, path, asked)
    return agreeing(parts)


def find_models(source: Path) -> dict[Kind, tuple[ModuleType, Path]]:
    """Return the format and the place of each model that a source holds; no weights are read.

    Raises:
        CheckpointError: there is nothing, or nothing that is known.
    """
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    for module in FORMATS.values():
        if found := module.find(source):
            return {kind: (module, found[kind]) for kind in KINDS if kind in found}
    raise CheckpointError(
        f"{source} is no checkpoint that is known here: neither a diffusers folder (transformer/config.json, "
        "vae/config.json), nor SAT's (transformer/latest, vae/3d-vae.pt), nor a run of ours (checkpoints/step-...)"
    )


def agreeing(parts: dict[Kind, Part]) -> dict[Kind, Part]:
    """Return the parts with the transformer's scale of the latents in the VAE, where formats keep it.

    Raises:
        ConfigError: the VAE's latents aren't the transformer's, or nobody knows the VAE's scale.
    """
    vae, transformer = parts.get("vae"), parts.get("transformer")
    if vae is None:
        return parts
    if transformer is None:
        if not vae.knows_scale:
            raise ConfigError(
                f"{vae.tensors.path} doesn't say what its latents are multiplied by; name the model that it belongs to "
                "with --variant, or convert it together with the transformer"
            )
        return parts
    made, settings = transformer.transformer, vae.vae.vae
    for key, ours, theirs in (
        ("out_channels", made.model.out_channels, settings.latent_channels),
        ("temporal_compression_ratio", made.model.temporal_compression_ratio, settings.temporal_compression_ratio),
    ):
        if ours != theirs:
            raise ConfigError(
                f"model.{key}={ours} of the transformer {transformer.tensors.path}, but the VAE {vae.tensors.path} has "
                f"{theirs}; they don't belong together"
            )
    scaled = settings.model_copy(update={"scaling_factor": made.scaling_factor})
    return {**parts, "vae": replace(vae, settings=VAESettings(scaled))}


def merged_and_cast(
    parts: Mapping[Kind, Part], adapters: Sequence[Path], strength: float, dtype: str | None
) -> dict[Kind, Part]:
    """Return the parts with LoRA adapters merged into the transformer, then in another dtype.

    Raises:
        ConfigError: there is no transformer to merge into.
        CheckpointError: an adapter is damaged or doesn't fit.
    """
    parts = dict(parts)
    if adapters:
        if "transformer" not in parts:
            raise ConfigError("--lora needs a transformer to merge into, and the sources hold none")
        parts["transformer"] = merge(parts["transformer"], [Adapter.open(path, strength) for path in adapters])
    return {kind: part.cast(dtype) for kind, part in parts.items()}


def convert(
    parts: Mapping[Kind, Part],
    to: str,
    output: Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    text_encoder: Path | None = None,
    link_text_encoder: bool = False,
    check: bool = True,
) -> Path:
    """Write the parts in one format.

    Args:
        parts: what `open_parts` gave.
        to: a key of `FORMATS`.
        output: folder to make.
        max_shard_bytes: of diffusers' files.
        text_encoder: folder with `tokenizer/` and `text_encoder/` to put beside, or None.
        link_text_encoder: link to it instead of copying.
        check: read everything back and compare it with the source, bit by bit.

    Returns:
        `output`.

    Raises:
        ConfigError: `output` is there already.
        CheckpointError: the source can't be read to its end, or the output isn't equal to it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} is there already; name another folder, or remove it")
    module, partial = FORMATS[to], output.with_name(output.name + PARTIAL)
    for part in parts.values():
        _log_losses(part, module)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if text_encoder is not None:
            _put_text_encoder(text_encoder, partial, link_text_encoder)
        for part in parts.values():
            module.write_part(part, partial, max_shard_bytes)
        if module is diffusers:
            diffusers.finish(partial, parts)
        if check:
            _check_equal(parts, module, partial)
        if output.is_dir():
            output.rmdir()
        os.replace(partial, output)
    except OSError as error:
        raise CheckpointError(f"{output} can't be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("wrote %s: %s of format %s", output, " and ".join(parts), to)
    return output


def text_encoder_folder(given: Path | None, sources: Sequence[Path], how: str) -> Path | None:
    """Return the folder of the text encoder that goes along: the one that is named, or a source's own.

    Raises:
        ConfigError: the named one isn't such a folder.
    """
    if how == "none":
        return None
    for folder in [given] if given is not None else sources:
        if all((folder / name).is_dir() for name in TEXT_FOLDERS):
            return folder
    if given is not None:
        raise ConfigError(f"--text-encoder {given} has no {' and '.join(name + '/' for name in TEXT_FOLDERS)}")
    return None


def shard_bytes(text: str) -> int:
    """Return bytes of a size such as 5GB.

    Raises:
        ConfigError: it isn't one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip().upper())
    if match is None or not float(match[1]) > 0:
        raise ConfigError(f"--max-shard-size {text} is no size; write it like 5GB, 500MB or 100KB")
    return int(float(match[1]) * SIZES[match[2]])


def _log_losses(part: Part, module: ModuleType) -> None:
    if part.kind == "transformer" and module is not megacogvx:
        for lost in module.not_carried(part.transformer):
            logger.warning("%s can't hold %s", module.NAME, lost)


def _put_text_encoder(folder: Path, output: Path, link: bool) -> None:
    for name in TEXT_FOLDERS:
        if link:
            (output / name).symlink_to((folder / name).resolve(), target_is_directory=True)
        else:
            shutil.copytree(folder / name, output / name)


def _check_equal(parts: Mapping[Kind, Part], module: ModuleType, output: Path) -> None:
    """Read the output back and compare every tensor with its source, bit by bit."""
    for kind, found in module.find(output).items():
        written, part = module.open_part(kind, found, ReadOptions()), parts[kind]
        for name in progress(list(part.tensors.infos), f"check {kind}"):
            if not _same_bits(written.tensors.read(name), part.tensors.read(name)):
                raise CheckpointError(f"{found}: {name} was read back with other values than were written")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
