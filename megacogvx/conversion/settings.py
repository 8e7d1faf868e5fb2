"""What has to travel with the weights: sizes, and every convention in which the formats differ.

Settings are the sections of our resolved config. What a foreign format has no word for goes into a small file beside
its weights (`megacogvx.json`), which only we read, so that a way there and back keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megacogvx.checkpoint.find import read_section
from megacogvx.config import Section, dump_config
from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.errors import CheckpointError
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig

SIDECAR = "megacogvx.json"
FORMAT, VERSION = "megacogvx-settings", 1
UNKNOWN = "unknown"  # fingerprint of an encoder that wasn't at hand


class Conventions(Section):
    """Section `conventions`: how the weights expect to be used, beside what `model` and `diffusion` say.

    Attributes:
        unconditional_text: what stands for no prompt: `zeros` (dropped texts of training), or `empty`, the encoded
            empty prompt (diffusers' pipelines).
        image_latent_scale: image to video: whether the image's latents are multiplied by the scaling factor (1.0) or
            divided by it (1.5; diffusers' `invert_scale_latents`).
        repeated_frames: temporal patches: whether the frames that are repeated in front are sampled by the model's own
            prediction (`predicted`: they carried loss in training) or follow the first frame (`copied`: they did not).
        sampler: which one is meant.
    """

    unconditional_text: Literal["zeros", "empty"] = "zeros"
    image_latent_scale: Literal["multiply", "divide"] = "multiply"
    repeated_frames: Literal["predicted", "copied"] = "copied"
    sampler: Literal["ddim", "dpm"] = "ddim"


@dataclass(frozen=True)
class TransformerSettings:
    """Everything a transformer's checkpoint says beside its weights, by section."""

    model: CogVideoXConfig
    diffusion: DiffusionConfig
    encoder: EncoderInfo
    conventions: Conventions

    @classmethod
    def from_sections(cls, sections: Mapping[str, Any], source: str) -> TransformerSettings:
        """Build the sections; `conventions` may be left out (our own training's).

        Raises:
            CheckpointError: a section is missing, or doesn't fit this version.
        """
        return cls(
            read_section(sections, "model", CogVideoXConfig, source),
            read_section(sections, "diffusion", DiffusionConfig, source),
            read_section(sections, "encoder", EncoderInfo, source),
            read_section({"conventions": {}, **sections}, "conventions", Conventions, source),
        )

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents are multiplied by."""
        return self.diffusion.scaling_factor or self.encoder.latent_scale_factor

    @property
    def expects_image(self) -> bool:
        """Whether this is an image-to-video model."""
        return self.model.in_channels == 2 * self.model.out_channels


@dataclass(frozen=True)
class VAESettings:
    """Everything a VAE's checkpoint says beside its weights."""

    vae: VAEConfig

    @classmethod
    def from_sections(cls, sections: Mapping[str, Any], source: str) -> VAESettings:
        """Build the section.

        Raises:
            CheckpointError: it is missing, or doesn't fit this version.
        """
        return cls(read_section(sections, "vae", VAEConfig, source))


Settings = TransformerSettings | VAESettings

# What the released weights were trained with and their files don't say: the noise schedule's shift, the latents' scale,
# and what diffusers' folders have for image latents and sampler.
_PUBLISHED: dict[str, tuple[float, float, str, str]] = {
    "cogvideox_2b": (3.0, 1.15258426, "multiply", "ddim"),
    "cogvideox_5b": (1.0, 0.7, "multiply", "dpm"),
    "cogvideox_5b_i2v": (1.0, 0.7, "multiply", "dpm"),
    "cogvideox1_5_5b": (1.0, 0.7, "multiply", "dpm"),
    "cogvideox1_5_5b_i2v": (1.0, 0.7, "divide", "dpm"),
}
VARIANTS = {"2b": "cogvideox_2b", "5b": "cogvideox_5b", "5b-i2v": "cogvideox_5b_i2v", "1.5-5b": "cogvideox1_5_5b",
            "1.5-5b-i2v": "cogvideox1_5_5b_i2v"}  # fmt: skip


def published_settings(variant: str) -> TransformerSettings:
    """Return the settings of a released model as SAT trained it.

    Args:
        variant: a key of `VARIANTS`.

    SAT's configs: eps 1e-6 in the final norm, rotary positions counted from the corner, zeros for dropped texts, 224
    text tokens for 1.5 (226 before), and loss on the repeated first frame. One thing is as in diffusers: q and k are
    rotated in fp32, which is more exact and has a kernel; `model.rope_precision=weights` rotates as SAT does.
    """
    preset = VARIANTS[variant]
    snr_shift, scale, image_scale, sampler = _PUBLISHED[preset]
    model = CogVideoXConfig(preset=preset, final_norm_eps=1e-6)
    return TransformerSettings(
        model,
        DiffusionConfig(snr_shift=snr_shift, scaling_factor=scale),
        encoder_info(model, scale, 226 if model.patch_size_t == 1 else 224),
        Conventions.model_validate(
            {"image_latent_scale": image_scale, "sampler": sampler, "repeated_frames": "predicted"}
        ),
    )


def encoder_info(model: CogVideoXConfig, scaling_factor: float, text_length: int) -> EncoderInfo:
    """Return what released weights were encoded with: texts padded to one length, by encoders that aren't at hand."""
    return EncoderInfo(
        text_kind="padded", text_length=text_length, text_width=model.text_embed_dim,
        latent_channels=model.out_channels, latent_scale_factor=scaling_factor,
        vae_fingerprint=UNKNOWN, text_encoder_fingerprint=UNKNOWN,
    )  # fmt: skip


def dump_settings(settings: Settings) -> dict[str, Any]:
    """Return the sections as plain values."""
    return {name: dump_config(section) for name, section in vars(settings).items()}


def write_sidecar(settings: Settings, folder: Path) -> None:
    """Write the settings beside foreign weights."""
    content = {"format": FORMAT, "version": VERSION, **dump_settings(settings)}
    (folder / SIDECAR).write_text(json.dumps(content, indent=1) + "\n")


def read_sidecar(folder: Path) -> dict[str, Any] | None:
    """Return the sections that `write_sidecar` wrote into a folder, or None.

    Raises:
        CheckpointError: the file is damaged or of a later version.
    """
    file = folder / SIDECAR
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("format") != FORMAT or not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise CheckpointError(
            f"{file} is of format {content.get('format')!r}, version {content.get('version')!r}; this program reads "
            f"{FORMAT!r} up to version {VERSION}"
        )
    return {name: section for name, section in content.items() if name not in ("format", "version")}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: there is no such file, or it isn't one.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content
