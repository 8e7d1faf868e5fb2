"""What the packs of a step look like: those that the plan makes of the dataset, or full ones of equal clips."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import Corpus
from megacogvx.data.indexed.manifest import MANIFEST
from megacogvx.data.indexed.remote import folder_at
from megacogvx.data.pack import planned_layout
from megacogvx.data.planner import PackPlan
from megacogvx.errors import ConfigError
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.flops import cost_coefficients
from megacogvx.pack_layout import PackLayout, build_layout, place_sample
from megacogvx.training.config import TrainConfig

VAE_RATIO = 8  # pixels per latent cell in height and width


@dataclass(frozen=True)
class Workload:
    """The packs of one step.

    Attributes:
        layouts: packs that stand for all of them; the step's very own where the dataset is at hand.
        packs: packs of a step.
        source: where the layouts come from, for the report.
        samples: `data.samples_per_step`: packs follow from it and may be rounded; None: the config asks for packs.
        token_ids: whether texts are token ids, which training encodes; where the dataset isn't at hand, what the
            config tells of it.
    """

    layouts: tuple[PackLayout, ...]
    packs: int
    source: str
    samples: int | None
    token_ids: bool = False

    @property
    def samples_per_pack(self) -> float:
        """Mean number of samples, the padding not counted."""
        return sum(layout.num_samples - 1 for layout in self.layouts) / len(self.layouts)

    @property
    def used_tokens_per_pack(self) -> float:
        """Mean number of tokens that samples use."""
        return sum(layout.used_tokens for layout in self.layouts) / len(self.layouts)

    @property
    def tokens_per_sample(self) -> float:
        """Mean length of a sample, text and video."""
        return self.used_tokens_per_pack / self.samples_per_pack


def workload(config: TrainConfig, clip: Sequence[int] | None = None) -> Workload:
    """Return the packs of one step of `config`.

    Args:
        config: a training's.
        clip: (frames, height, width) of the clips in pixels; None takes the dataset's index where all of `data.paths`
            exist, else clips of the model's native size.

    Raises:
        ConfigError: such a clip doesn't fit the patch, or is longer than a pack.
        DataError: the dataset can't be read.
    """
    data, model = config.data, config.model
    folders = [folder_at(path if isinstance(path, str) else path[1]) for path in data.paths]
    if clip is None and all((folder / MANIFEST).is_file() for folder in folders):
        return _planned(data, model, config.training.seed)
    layout, text = _equal_clips(model, data.tokens_per_pack, clip)
    packs = data.in_packs(layout.samples[0].length).packs_per_step
    # an encoder is named for token ids, or for the empty prompt alone
    token_ids = config.text.encoder is not None and config.diffusion.dropped_text != "empty"
    return Workload((layout,), packs, text, data.samples_per_step, token_ids)


def parse_clip(text: str) -> tuple[int, int, int]:
    """Read "49x480x720": frames, height, width in pixels.

    Raises:
        ConfigError: it is written otherwise.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not match:
        raise ConfigError(f"clip {text!r} must be FRAMESxHEIGHTxWIDTH in pixels, such as 49x480x720")
    frames, height, width = (int(part) for part in match.groups())
    return frames, height, width


def _planned(data: DataConfig, model: CogVideoXConfig, seed: int) -> Workload:
    corpus = Corpus(data)
    mean = corpus.columns.mean_length(model.patch)
    plan = PackPlan(corpus.columns, data.in_packs(mean), seed, model.patch, cost_coefficients(model))
    layouts = [planned_layout(corpus, indices, model.patch, data.tokens_per_pack) for indices in plan.step(0)]
    return Workload(
        tuple(layouts), len(layouts), "the packs of step 0 of the dataset", data.samples_per_step,
        corpus.encoder.text_kind == "token_ids",
    )  # fmt: skip


def _equal_clips(model: CogVideoXConfig, budget: int, clip: Sequence[int] | None) -> tuple[PackLayout, str]:
    ratio = model.temporal_compression_ratio
    if clip is None:
        clip = (model.sample_frames, model.sample_height * VAE_RATIO, model.sample_width * VAE_RATIO)
    frames, height, width = clip
    if height % VAE_RATIO or width % VAE_RATIO or (frames - 1) % ratio:
        raise ConfigError(
            f"a clip of {frames} x {height} x {width} can't be encoded: frames must be {ratio}k + 1, height and width "
            f"multiples of {VAE_RATIO}; the nearest that can: {(frames - 1) // ratio * ratio + 1} x "
            f"{max(1, height // VAE_RATIO) * VAE_RATIO} x {max(1, width // VAE_RATIO) * VAE_RATIO}"
        )
    size = ((frames - 1) // ratio + 1, height // VAE_RATIO, width // VAE_RATIO)
    sample = place_sample(0, *size, model.max_text_seq_length, model.patch)
    if sample.length > budget:
        raise ConfigError(
            f"a clip of {frames} x {height} x {width} is {sample.length} tokens, more than "
            f"data.tokens_per_pack={budget}; raise it, or name another clip"
        )
    samples = [
        place_sample(place, *size, model.max_text_seq_length, model.patch) for place in range(budget // sample.length)
    ]
    text = f"as many clips of {frames} x {height} x {width} pixels as fit, captions of {model.max_text_seq_length}"
    return build_layout(samples, model.patch, budget), text
