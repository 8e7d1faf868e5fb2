"""Folders as diffusers' CogVideoX pipelines save and load them: JSON configs and (sharded) safetensors.

    model_index.json
    scheduler/scheduler_config.json
    text_encoder/ tokenizer/                        copied or linked by `convert.py`
    transformer/config.json, *.safetensors          class CogVideoXTransformer3DModel
    vae/config.json, *.safetensors                  class AutoencoderKLCogVideoX

What the configs say is translated in `diffusers_settings.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacogvx.conversion.diffusers_settings import (
    CONFIG,
    SCHEDULER_CONFIG,
    SCHEDULERS,
    TEXT_LENGTH,
    WRITTEN_FOR,
    read_transformer,
    read_vae,
    scheduler_config,
    transformer_config,
    vae_config,
)
from megacogvx.conversion.part import Kind, Part, ReadOptions, check_live
from megacogvx.conversion.published_names import diffusers_transformer, diffusers_vae
from megacogvx.conversion.safetensors_files import SafetensorsFiles, write_safetensors
from megacogvx.conversion.settings import TransformerSettings, read_json, write_sidecar
from megacogvx.conversion.tensors import Translated, check_complete, translate, translated_infos
from megacogvx.errors import CheckpointError

NAME = "diffusers"
CLASSES: dict[Kind, str] = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
INDEX = "model_index.json"


def find(path: Path) -> dict[Kind, Path]:
    """Return the folders of the models that `path` holds: a pipeline's folder, or one model's own."""
    found: dict[Kind, Path] = {}
    for kind, class_name in CLASSES.items():
        for folder in (path / kind, path):
            if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("_class_name") == class_name:
                found[kind] = folder
                break
    if not found and (path / INDEX).is_file():
        raise CheckpointError(
            f"{path} is a {read_json(path / INDEX).get('_class_name')!r}, and no CogVideoX pipeline: it has neither "
            f"{CLASSES['transformer']} in transformer/ nor {CLASSES['vae']} in vae/"
        )
    return found


def open_part(kind: Kind, folder: Path, options: ReadOptions) -> Part:
    """Read the settings and names of one model.

    Raises:
        CheckpointError: a file is missing or damaged, a setting is one that our models don't have, or tensors are
            missing or left over.
        ConfigError: `options` asks for what the format can't have.
    """
    check_live(options, f"a diffusers folder ({folder})")
    source = SafetensorsFiles(folder)
    if kind == "vae":
        vae = read_vae(folder)
        table = diffusers_vae(vae.vae)
        check_complete(source, table, f"the VAE that {folder / CONFIG} describes")
        return Part("vae", NAME, vae, Translated(source, table))
    settings = read_transformer(folder)
    table = diffusers_transformer(settings.model)
    check_complete(source, table, f"the transformer that {folder / CONFIG} describes")
    return Part("transformer", NAME, settings, Translated(source, table))


def write_part(part: Part, root: Path, max_shard_bytes: int) -> Path:
    """Write one model's folder below `root`, and return it."""
    folder = root / part.kind
    if part.kind == "vae":
        table, config = diffusers_vae(part.vae.vae), vae_config(part.vae.vae)
    else:
        table, config = diffusers_transformer(part.transformer.model), transformer_config(part.transformer.model)
        _write_json(root / SCHEDULER_CONFIG, scheduler_config(part.transformer))
    infos = translated_infos(part.tensors, table)
    write_safetensors(folder, infos, translate(part.tensors, table), max_shard_bytes)
    _write_json(folder / CONFIG, {"_class_name": CLASSES[part.kind], "_diffusers_version": WRITTEN_FOR, **config})
    if part.kind == "transformer":
        write_sidecar(part.settings, folder)
    return folder


def finish(root: Path, parts: Mapping[Kind, Part]) -> None:
    """Write what ties the models together, once transformer and VAE are there."""
    if set(parts) != set(CLASSES):
        return
    settings = parts["transformer"].transformer
    if settings.expects_image:  # the VAE's config is where the pipeline looks for it
        vae = json.loads((root / "vae" / CONFIG).read_text())
        vae["invert_scale_latents"] = settings.conventions.image_latent_scale == "divide"
        _write_json(root / "vae" / CONFIG, vae)
    has_text = (root / "text_encoder").is_dir()
    _write_json(
        root / INDEX,
        {
            "_class_name": "CogVideoXImageToVideoPipeline" if settings.expects_image else "CogVideoXPipeline",
            "_diffusers_version": WRITTEN_FOR,
            "scheduler": ["diffusers", SCHEDULERS[settings.conventions.sampler]],
            "text_encoder": ["transformers", "T5EncoderModel"] if has_text else [None, None],
            "tokenizer": ["transformers", "T5Tokenizer"] if has_text else [None, None],
            **{kind: ["diffusers", class_name] for kind, class_name in CLASSES.items()},
        },
    )


def not_carried(settings: TransformerSettings) -> list[str]:
    """Return which conventions a diffusers folder has no word for (the sidecar keeps them for us)."""
    model, lost = settings.model, []
    if model.final_norm_eps != model.norm_eps:
        lost.append(
            f"model.final_norm_eps={model.final_norm_eps:g}: its last norm takes norm_eps={model.norm_eps:g} "
            "(outputs differ by about 4e-6)"
        )
    for key, fixed in (("qk_norm_eps", 1e-6), ("rope_theta", 10000.0)):
        if getattr(model, key) != fixed:
            lost.append(f"model.{key}={getattr(model, key):g}: fixed at {fixed:g} there, so results will differ")
    if model.use_rotary_positional_embeddings and model.rope_precision != "fp32":
        lost.append(f"model.rope_precision={model.rope_precision}: it rotates in fp32, so results differ by rounding")
    if model.use_rotary_positional_embeddings and (model.rope_grid == "slice") != (model.patch_size_t > 1):
        lost.append(
            f"model.rope_grid={model.rope_grid}: its pipelines use the other grid with this patch_size_t; equal at "
            "the native size only"
        )
    if settings.conventions.unconditional_text == "zeros":
        lost.append(
            "conventions.unconditional_text=zeros: its pipelines encode an empty prompt; pass "
            "negative_prompt_embeds=torch.zeros_like(prompt_embeds)"
        )
    if not settings.encoder.pads_text:
        lost.append("encoder.text_kind=real: its pipelines pad every text; pass prompt_embeds of the real length")
    elif settings.encoder.text_length != TEXT_LENGTH:
        lost.append(f"encoder.text_length={settings.encoder.text_length}: pass it as max_sequence_length")
    if settings.conventions.repeated_frames == "copied" and model.patch_size_t > 1:
        lost.append("conventions.repeated_frames=copied: its pipelines sample the repeated frames in front freely")
    return lost


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
