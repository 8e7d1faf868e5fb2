"""SAT's files, as the CogVideoX weights were released and its training saves them (github.com/THUDM/CogVideo, `sat/`).

    transformer/latest                              the step, as text
    transformer/1000/mp_rank_00_model_states.pt     {"module": {"model.diffusion_model.<name>": tensor, ...}, ...}
    transformer/1000-ema/...                        the same, averaged (what its training writes beside)
    vae/3d-vae.pt                                   {"state_dict": {...}}, with the loss's own networks

The files hold no settings. A released model is known by the shapes of its tensors; another one needs a config, or the
`megacogvx.json` that we write beside.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megacogvx.config import read_yaml
from megacogvx.conversion.part import LIVE, Kind, Part, ReadOptions, Renamed, check_live
from megacogvx.conversion.pickled_files import PickledFile, write_pickled
from megacogvx.conversion.published_names import POSITIONS, sat_transformer, sat_vae
from megacogvx.conversion.settings import (
    VARIANTS,
    TransformerSettings,
    VAESettings,
    published_settings,
    read_sidecar,
    write_sidecar,
)
from megacogvx.conversion.tensors import (
    Table,
    TensorInfo,
    TensorSource,
    Translated,
    check_complete,
    shortened,
    translate,
    translated_infos,
)
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.log import get_logger
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig

NAME = "sat"
LATEST, STATES, VAE_FILE = "latest", "mp_rank_00_model_states.pt", "3d-vae.pt"
STEP = "1"  # the name of the folder that we write, as in some releases
PREFIX = "model.diffusion_model."
# Tables that are computed, and embeddings of the language model that SAT's transformer class was made for.
COMPUTED = re.compile(
    r"transformer\.(position_embeddings|word_embeddings)\.|mixins\.pos_embed\.freqs_(sin|cos)$|(^|\.)embed_tokens\."
)
LOSS = "loss."  # the VAE's discriminator and perceptual network
VAE_PARTS = ("encoder.", "decoder.")

logger = get_logger(__name__)


def find(path: Path) -> dict[Kind, Path]:
    """Return the files or folders of the models that `path` holds: a release, one of its folders, or a file."""
    found: dict[Kind, Path] = {}
    for folder in (path / "transformer", path):
        if (folder / LATEST).is_file() or (folder / STATES).is_file():
            found["transformer"] = folder
            break
    for file in (path / "vae" / VAE_FILE, path / VAE_FILE):
        if file.is_file():
            found["vae"] = file
            break
    if path.suffix == ".pt" and path.is_file():
        found["transformer" if path.name == STATES else "vae"] = path
    return found


def open_part(kind: Kind, path: Path, options: ReadOptions) -> Part:
    """Read the names of one model, and find out its settings.

    Raises:
        CheckpointError: a file is missing or damaged, tensors are missing or left over, or there are foreign ones and
            `options.drop_foreign` isn't set.
        ConfigError: the settings can't be known from the file alone, or `options` contradicts it.
    """
    if kind == "vae":
        return _open_vae(path, options)
    file = states_file(path, options.weights)
    source = _own_tensors(PickledFile(file, "module"), file, options)
    settings = _transformer_settings(source, file, options)
    names = {name: name for name in source.infos if not COMPUTED.search(name)}
    if not settings.model.use_learned_positional_embeddings:
        names.pop(POSITIONS[1], None)  # 2B's is computed
    table = sat_transformer(settings.model)
    kept = Renamed(source, names)
    check_complete(kept, table, f"the transformer {_description(settings.model)}")
    return Part("transformer", NAME, settings, Translated(kept, table))


def write_part(part: Part, root: Path, max_shard_bytes: int) -> Path:
    """Write one model's files below `root`, and return their folder; SAT knows no shards."""
    folder = root / part.kind
    if part.kind == "vae":
        table = sat_vae(part.vae.vae)
        infos = translated_infos(part.tensors, table)
        write_pickled(folder / VAE_FILE, "state_dict", infos, translate(part.tensors, table))
    else:
        model = part.transformer.model
        table = sat_transformer(model)
        infos = {PREFIX + name: info for name, info in translated_infos(part.tensors, table).items()}
        tensors = ((PREFIX + name, tensor) for name, tensor in translate(part.tensors, table))
        if not model.use_rotary_positional_embeddings:
            # SAT keeps 2B's computed table among the weights, and misses it when it isn't there.
            positions = sincos_table(model).to(next(iter(infos.values())).dtype)
            infos[PREFIX + POSITIONS[1]] = TensorInfo(tuple(positions.shape), positions.dtype)
            tensors = (pair for pairs in (tensors, [(PREFIX + POSITIONS[1], positions)]) for pair in pairs)
        write_pickled(folder / STEP / STATES, "module", infos, tensors)
        (folder / LATEST).write_text(STEP)
    write_sidecar(part.settings, folder)
    return folder


def not_carried(settings: TransformerSettings) -> list[str]:
    """Return which conventions SAT's own configs have to be told by hand, or can't (the sidecar keeps them for us)."""
    model = settings.model
    lost = [
        f"diffusion.scaling_factor={settings.scaling_factor:g} and diffusion.snr_shift={settings.diffusion.snr_shift:g}"
        ": SAT reads scale_factor and shift_scale from its own YAML config"
    ]
    for key, fixed in (("norm_eps", 1e-5), ("qk_norm_eps", 1e-6), ("final_norm_eps", 1e-6), ("rope_theta", 10000.0)):
        if getattr(model, key) != fixed:
            lost.append(f"model.{key}={getattr(model, key):g}: fixed at {fixed:g} there, so results differ slightly")
    if model.use_rotary_positional_embeddings and model.rope_grid == "crop":
        lost.append("model.rope_grid=crop: SAT counts positions from the corner; equal at the native size only")
    if settings.conventions.unconditional_text == "empty":
        lost.append("conventions.unconditional_text=empty: SAT takes zeros for no prompt")
    return lost


def states_file(path: Path, weights: str) -> Path:
    """Return the file with a set of weights: `path` is that file, its folder, or the folder with `latest`.

    Raises:
        CheckpointError: there is none, or the model is split over several files.
    """
    folder = path.parent if path.is_file() else path
    if (folder / LATEST).is_file():
        step = (folder / LATEST).read_text().strip()
        if not step or Path(step).name != step:
            raise CheckpointError(f"{folder / LATEST} holds {step!r}, not the name of a folder beside it")
        folder = folder / step
    if weights != LIVE:
        folder = folder.with_name(f"{folder.name}-{weights}")
    file = folder / STATES
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist{_sets_beside(folder, weights)}")
    if more := sorted(folder.glob("mp_rank_0[1-9]*_model_states.pt")):
        raise CheckpointError(
            f"{folder} holds a model that is split over {1 + len(more)} tensor-parallel files; merge it with SAT "
            "(merge_model) first"
        )
    return file


def sincos_table(model: CogVideoXConfig) -> torch.Tensor:
    """Return 2B's table of added positions as SAT keeps it: fp32 `[1, text + tokens, D]`, zeros for the text."""
    from megacogvx.models.transformer.embedding import sincos_positions

    frames, height, width = model.native_grid
    scales = model.temporal_interpolation_scale, model.spatial_interpolation_scale
    codes = sincos_positions(
        torch.arange(frames * height * width), (frames, height, width), model.hidden_size, *scales
    ).float()
    return torch.cat([codes.new_zeros(model.max_text_seq_length, model.hidden_size), codes])[None]


def _open_vae(file: Path, options: ReadOptions) -> Part:
    check_live(options, f"SAT's VAE ({file})")
    everything = PickledFile(file, "state_dict", "")
    foreign = [name for name in everything.infos if not name.startswith((*VAE_PARTS, LOSS))]
    _check_foreign(foreign, file, options)
    source = Renamed(everything, {name: name for name in everything.infos if name.startswith(VAE_PARTS)})
    settings, knows_scale = _vae_settings(file, options)
    table = sat_vae(settings.vae)
    check_complete(source, table, f"the VAE with block_out_channels={settings.vae.block_out_channels}")
    return Part("vae", NAME, settings, Translated(source, table), knows_scale)


def _own_tensors(everything: PickledFile, file: Path, options: ReadOptions) -> TensorSource:
    """Return the transformer's tensors without the prefix; what a trained model has besides is foreign."""
    own = {name.removeprefix(PREFIX): name for name in everything.infos if name.startswith(PREFIX)}
    if not own:
        raise CheckpointError(
            f"{file} holds no tensor {PREFIX}..., so it is no SAT checkpoint of a CogVideoX transformer; it has "
            f"{shortened(everything.infos)}"
        )
    _check_foreign([name for name in everything.infos if not name.startswith(PREFIX)], file, options)
    return Renamed(everything, own)


def _check_foreign(foreign: list[str], file: Path, options: ReadOptions) -> None:
    if not foreign:
        return
    if not options.drop_foreign:
        raise CheckpointError(
            f"{file} holds {len(foreign)} tensors of other models: {shortened(foreign)}; leave them out with "
            "--drop-foreign"
        )
    logger.info("%s: left out %d foreign tensors: %s", file, len(foreign), shortened(foreign))


def _transformer_settings(source: TensorSource, file: Path, options: ReadOptions) -> TransformerSettings:
    """Return the settings that were asked for, or were written beside, or belong to a released model's shapes."""
    if options.variant is not None:
        return published_settings(options.variant)
    if options.config is not None:
        sections: dict[str, Any] = read_yaml(options.config)
        return TransformerSettings.from_sections(sections, str(options.config))
    for folder in (file.parent, file.parent.parent):
        if (sections_beside := read_sidecar(folder)) is not None:
            return TransformerSettings.from_sections(sections_beside, str(folder))
    for variant in VARIANTS:
        settings = published_settings(variant)
        if _fits(source, _published_table(variant)):
            logger.info("%s is CogVideoX %s by its shapes", file, variant)
            return settings
    raise ConfigError(
        f"{file} is none of the released models ({', '.join(VARIANTS)}) by its shapes; describe it to `megacogvx "
        "convert` with --config FILE.yaml (sections model, diffusion, encoder, as in a run's config.yaml), or name the "
        "nearest with --variant to see what differs"
    )


def _vae_settings(file: Path, options: ReadOptions) -> tuple[VAESettings, bool]:
    """Return the settings, and whether their scaling factor is known."""
    if (sections := read_sidecar(file.parent)) is not None:
        return VAESettings.from_sections(sections, str(file.parent)), True
    if options.variant is not None:
        return VAESettings(VAEConfig(scaling_factor=published_settings(options.variant).scaling_factor)), True
    if options.config is not None:
        sections = read_yaml(options.config)
        return VAESettings.from_sections({"vae": {}, **sections}, str(options.config)), "vae" in sections
    return VAESettings(VAEConfig()), False


@cache
def _published_table(variant: str) -> Table:
    return sat_transformer(published_settings(variant).model)


def _fits(source: TensorSource, table: Table) -> bool:
    return all(
        name in source.infos and source.infos[name].shape in (shape, group.accepted)
        for group in table
        for name, shape in group.their_shapes().items()
    )


def _description(model: CogVideoXConfig) -> str:
    return f"of {model.num_layers} layers, width {model.hidden_size}, {model.in_channels} input channels"


def _sets_beside(folder: Path, weights: str) -> str:
    if weights == LIVE or not folder.parent.is_dir():
        return ""
    sets = sorted(path.name for path in folder.parent.iterdir() if (path / STATES).is_file())
    return f", so there are no weights {weights!r}; folders with weights: {', '.join(sets) or 'none'}"
