"""The settings of diffusers' CogVideoX classes in our words, and ours in theirs.

Names of settings and their defaults are those of diffusers 0.42 (`models/transformers/cogvideox_transformer_3d.py`,
`models/autoencoders/autoencoder_kl_cogvideox.py`, `schedulers/scheduling_ddim_cogvideox.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacogvx.config import build_config
from megacogvx.conversion.settings import (
    TransformerSettings,
    VAESettings,
    encoder_info,
    published_settings,
    read_json,
    read_sidecar,
)
from megacogvx.diffusion.schedule import BETA_END, BETA_START
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig

WRITTEN_FOR = "0.42.1"
SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler/scheduler_config.json"
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
        own = ("final_norm_eps", "rope_grid", "qk_norm_eps", "rope_theta", "rope_precision")
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
