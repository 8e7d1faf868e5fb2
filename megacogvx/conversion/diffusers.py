"""Folders as diffusers' CogVideoX pipelines save and load them: JSON configs and (sharded) safetensors.

    model_index.json
    scheduler/scheduler_config.json
    text_encoder/ tokenizer/                        copied or linked by `convert.py`
    transformer/config.json, *.safetensors          class CogVideoXTransformer3DModel
    vae/config.json, *.safetensors                  class AutoencoderKLCogVideoX

Names of settings and their defaults are those of diffusers 0.42 (`models/transformers/cogvideox_transformer_3d.py`,
`models/autoencoders/autoencoder_kl_cogvideox.py`, `schedulers/scheduling_ddim_cogvideox.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacogvx.config import build_config
from megacogvx.conversion.part import Kind, Part, ReadOptions, check_live
from megacogvx.conversion.published_names import diffusers_transformer, diffusers_vae
from megacogvx.conversion.safetensors_files import SafetensorsFiles, write_safetensors
from megacogvx.conversion.settings import (
    TransformerSettings,
    VAESettings,
    encoder_info,
    published_settings,
    read_json,
    read_sidecar,
    write_sidecar,
)
from megacogvx.conversion.tensors import Translated, check_complete, translate, translated_infos
from megacogvx.diffusion.schedule import BETA_END, BETA_START
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig

NAME = "diffusers"
WRITTEN_FOR = "0.42.1"
CLASSES: dict[Kind, str] = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
CONFIG, SCHEDULER_CONFIG, INDEX = "config.json", "scheduler/scheduler_config.json", "model_index.json"
TEXT_LENGTH = 226  # tokens, of its pipelines

# Settings that both have, under the same names.
SHARED_TRANSFORMER = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "time_embed_dim", "ofs_embed_dim",
    "text_embed_dim", "num_layers", "sample_width", "sample_height", "sample_frames", "patch_size",
    "temporal_compression_ratio", "max_text_seq_length", "norm_eps", "spatial_interpolation_scale",
    "temporal_interpolation_scale", "use_rotary_positional_embeddings", "use_learned_positional_embeddings",
)  # fmt: skip
SHARED_VAE = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_eps", "norm_num_groups",
              "temporal_compression_ratio", "scaling_factor")  # fmt: skip
# What our models are by construction: name -> (ours, the class's default for what a file leaves out).
FIXED_TRANSFORMER = {
    "flip_sin_to_cos": (True, True), "freq_shift": (0, 0), "attention_bias": (True, True), "dropout": (0.0, 0.0),
    "activation_fn": ("gelu-approximate", "gelu-approximate"), "timestep_activation_fn": ("silu", "silu"),
    "norm_elementwise_affine": (True, True),
}  # fmt: skip
FIXED_VAE = {
    "act_fn": ("silu", "silu"), "shift_factor": (None, None), "latents_mean": (None, None), "latents_std": (None, None),
    "use_quant_conv": (False, False), "use_post_quant_conv": (False, False),
}  # fmt: skip
FIXED_SCHEDULER = {
    "beta_start": (BETA_START, BETA_START), "beta_end": (BETA_END, BETA_END),
    "beta_schedule": ("scaled_linear", "scaled_linear"), "trained_betas": (None, None), "clip_sample": (False, True),
    "set_alpha_to_one": (True, True), "steps_offset": (0, 0), "prediction_type": ("v_prediction", "epsilon"),
    "timestep_spacing": ("trailing", "leading"), "rescale_betas_zero_snr": (True, False),
}  # fmt: skip


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


def read_transformer(folder: Path) -> TransformerSettings:
    """Return a transformer's settings from its config and those beside it; a sidecar fills in what they can't say.

    Without a sidecar the conventions are those of diffusers' pipelines: 1.0 weights on a grid that is fitted into the
    native one, the empty prompt for no prompt, repeated frames as predicted.
    """
    config, kept = read_json(folder / CONFIG), read_sidecar(folder) or {}
    _check_fixed(config, FIXED_TRANSFORMER, folder / CONFIG)
    model = _model(config, kept.get("model"), folder)
    scheduler, vae = folder.parent / SCHEDULER_CONFIG, folder.parent / "vae" / CONFIG
    # A transformer alone: what the released models of its kind have.
    released = published_settings("5b" if model.use_rotary_positional_embeddings else "2b")
    diffusion = {"snr_shift": released.diffusion.snr_shift, "scaling_factor": released.scaling_factor}
    conventions: dict[str, Any] = {
        "unconditional_text": "empty",
        "repeated_frames": "predicted",
        "image_latent_scale": "multiply" if model.ofs_embed_dim is None else "divide",
        "sampler": released.conventions.sampler,
    }
    diffusion |= kept.get("diffusion", {})
    conventions |= kept.get("conventions", {})
    if scheduler.is_file():
        found, conventions["sampler"] = _scheduler(read_json(scheduler), scheduler)
        diffusion |= found
    if vae.is_file():
        beside = read_json(vae)
        diffusion["scaling_factor"] = beside.get("scaling_factor", 1.15258426)
        conventions["image_latent_scale"] = "divide" if beside.get("invert_scale_latents", False) else "multiply"
    encoder = encoder_info(model, diffusion["scaling_factor"], TEXT_LENGTH).model_dump()
    encoder |= {key: value for key, value in kept.get("encoder", {}).items() if key.startswith(("text_k", "text_l"))}
    sections = {
        "model": model.model_dump(),
        "diffusion": diffusion,
        "encoder": encoder,
        "conventions": conventions,
    }
    return TransformerSettings.from_sections(sections, str(folder))


def read_vae(folder: Path) -> VAESettings:
    """Return a VAE's settings from its config."""
    config = read_json(folder / CONFIG)
    _check_fixed(config, FIXED_VAE, folder / CONFIG)
    for key in ("down_block_types", "up_block_types"):
        if len(set(config.get(key, [""]))) != 1:
            raise CheckpointError(f"{folder / CONFIG}: {key}={config[key]} are of several kinds; our VAE has one")
    released = VAEConfig(scaling_factor=1.15258426)
    values = {key: config.get(key, getattr(released, key)) for key in (*SHARED_VAE, "block_out_channels")}
    return VAESettings.from_sections({"vae": values}, str(folder / CONFIG))


def transformer_config(model: CogVideoXConfig) -> dict[str, Any]:
    """Return our settings in diffusers' words."""
    return {
        **{key: getattr(model, key) for key in SHARED_TRANSFORMER},
        **{key: ours for key, (ours, _) in FIXED_TRANSFORMER.items()},
        "patch_size_t": None if model.patch_size_t == 1 else model.patch_size_t,
        "patch_bias": model.patch_size_t == 1,  # as published; the linear layer of 1.5 has a bias nevertheless
    }


def vae_config(vae: VAEConfig) -> dict[str, Any]:
    """Return our settings in diffusers' words.

    Raises:
        CheckpointError: a model that codes each frame by itself; diffusers has none.
    """
    if vae.temporal_kernel_size != 3:
        raise CheckpointError(
            f"vae.temporal_kernel_size={vae.temporal_kernel_size}: diffusers' VAE has kernels of 3 frames only, so "
            "this one can't be written as a diffusers folder"
        )
    stages = len(vae.block_out_channels)
    return {
        **{key: getattr(vae, key) for key in SHARED_VAE},
        **{key: ours for key, (ours, _) in FIXED_VAE.items()},
        "block_out_channels": list(vae.block_out_channels),
        "down_block_types": ["CogVideoXDownBlock3D"] * stages,
        "up_block_types": ["CogVideoXUpBlock3D"] * stages,
        "force_upcast": True,
        "sample_height": 480,
        "sample_width": 720,
        "invert_scale_latents": False,
    }


def scheduler_config(settings: TransformerSettings) -> dict[str, Any]:
    """Return the noise schedule in diffusers' words."""
    return {
        "_class_name": SCHEDULERS[settings.conventions.sampler],
        "_diffusers_version": WRITTEN_FOR,
        **{key: ours for key, (ours, _) in FIXED_SCHEDULER.items()},
        "num_train_timesteps": settings.diffusion.num_train_timesteps,
        "snr_shift_scale": settings.diffusion.snr_shift,
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
    }


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


def _model(config: dict[str, Any], kept: Any, folder: Path) -> CogVideoXConfig:
    """Return the sizes: config.json's, and from the sidecar only what that has no word for."""
    file = folder / CONFIG
    default = CogVideoXConfig()
    values = {key: config.get(key, getattr(default, key)) for key in SHARED_TRANSFORMER}
    values["out_channels"] = values["in_channels"] if values["out_channels"] is None else values["out_channels"]
    values["patch_size_t"] = config.get("patch_size_t") or 1
    values["final_norm_eps"] = values["norm_eps"]
    is_rotary = values["use_rotary_positional_embeddings"]
    values["rope_grid"] = "crop" if is_rotary and values["patch_size_t"] == 1 else "slice"
    if isinstance(kept, Mapping):
        own = ("final_norm_eps", "rope_grid", "qk_norm_eps", "rope_theta")
        values |= {key: kept[key] for key in own if key in kept}
    try:
        return build_config(CogVideoXConfig, values, source=str(file))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _scheduler(config: dict[str, Any], file: Path) -> tuple[dict[str, Any], str]:
    """Return the section `diffusion` as far as a scheduler's config says it, and the sampler's name."""
    names = {class_name: name for name, class_name in SCHEDULERS.items()}
    if config.get("_class_name") not in names:
        raise CheckpointError(f"{file}: scheduler {config.get('_class_name')!r} is unknown; known: {', '.join(names)}")
    _check_fixed(config, FIXED_SCHEDULER, file)
    values = {
        "num_train_timesteps": config.get("num_train_timesteps", 1000),
        "snr_shift": config.get("snr_shift_scale", 3.0),
    }
    return values, names[config["_class_name"]]


def _check_fixed(config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, Any]], file: Path) -> None:
    wrong = [
        f"{key}={config.get(key, default)!r} (only {ours!r} is supported)"
        for key, (ours, default) in fixed.items()
        if config.get(key, default) != ours
    ]
    if wrong:
        raise CheckpointError(f"{file} describes a model that this program can't run: {'; '.join(wrong)}")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
