"""The sides that `bench_step.py` compares: our packs and diffusers' batches, same weights, inputs and loss.

A side is run forward and backward by one call; each returns the rows of every sample, so that outputs can be compared
in the run that is timed. What a training step prepares outside the model (patches of the latents, diffusers' rotary
tables) is made before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from megacogvx import draws
from megacogvx.models.transformer import CogVideoXConfig, CogVideoXTransformer, transformer_core
from megacogvx.pack_layout import PackLayout, build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.patches import patchify, unpatchify
from megacogvx.testing.published_names import to_our_names

Rows = list[torch.Tensor]
SAME_NAMES = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "time_embed_dim",
    "text_embed_dim", "sample_width", "sample_height", "sample_frames", "patch_size", "max_text_seq_length",
    "use_rotary_positional_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is computed: a model and the samples of one step.

    Attributes:
        config: section `model`; rotary positions by "slice".
        sizes: (T, H, W) of the latents and text tokens of each sample.
        dtype, device: of weights and inputs.
        precision: what they are widened to once they are rounded to `dtype`; None: they are left as they are.
    """

    config: CogVideoXConfig
    sizes: tuple[tuple[int, int, int, int], ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    precision: torch.dtype | None = None

    @cached_property
    def layout(self) -> PackLayout:
        """The pack of all samples, without padding."""
        return self.layout_of(range(len(self.sizes)))

    def layout_of(self, places: range | tuple[int, ...]) -> PackLayout:
        """Return the pack of some of the samples."""
        patch = self.config.patch
        return build_layout([place_sample(place, *self.sizes[place], patch) for place in places], patch)

    def latents(self, place: int) -> torch.Tensor:
        """Return the noisy latents `[T, C, H, W]` of a sample."""
        frames, height, width, _ = self.sizes[place]
        return self._draw("latents", place, frames, self.config.in_channels, height, width)

    def text(self, place: int) -> torch.Tensor:
        """Return the text embeddings `[L, E]` of a sample."""
        return self._draw("text", place, self.sizes[place][3], self.config.text_embed_dim)

    def cotangent(self, place: int) -> torch.Tensor:
        """Return the gradient of the loss by the rows `[V, P]` of a sample."""
        return self._draw("cotangent", place, self.layout.samples[place].video_length, self.config.row_size_out)

    def timestep(self, place: int) -> int:
        """Return the timestep of a sample."""
        return 999 - 71 * place % 1000

    def _draw(self, what: str, place: int, *shape: int) -> torch.Tensor:
        return draws.normal(shape, 0, what, place).to(self.device, self.dtype).to(self.precision or self.dtype)


def diffusers_model(case: Case) -> CogVideoXTransformer3DModel:
    """Make diffusers' model with weights at which every path matters: gates, biases and norms aren't trivial."""
    settings = {name: getattr(case.config, name) for name in SAME_NAMES}
    with torch.device(case.device):
        model = CogVideoXTransformer3DModel(**settings).to(case.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and "linear" not in name and name.endswith("weight")
            scale = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(draws.normal(tuple(parameter.shape), 1, name) * scale + float(is_norm))
    return model.to(case.precision or case.dtype).train()


def our_model(
    case: Case, theirs: CogVideoXTransformer3DModel, groups: ParallelGroups, recompute: str = "none"
) -> CogVideoXTransformer:
    """Make our model with diffusers' weights."""
    core = transformer_core(case.config, ParallelConfig(recompute=recompute), groups, case.dtype)
    model = CogVideoXTransformer(case.config, core, groups).to(case.device)
    model.load_state_dict(to_our_names(theirs.state_dict(), case.config))
    return model


class OurPack:
    """Some samples of a case as one pack through our model."""

    def __init__(self, case: Case, model: CogVideoXTransformer, places: range | tuple[int, ...]) -> None:
        self.model, self.layout = model, case.layout_of(places)
        self.video = torch.cat([patchify(case.latents(place), case.config.patch) for place in places])
        self.text = torch.cat([case.text(place) for place in places])
        self.timesteps = torch.tensor([*(case.timestep(place) for place in places), 0], device=case.device)
        self.cotangent = torch.cat([case.cotangent(place) for place in places])

    def forward(self) -> torch.Tensor:
        """Return the rows of the pack, `[V, P]`."""
        rows: torch.Tensor = self.model(self.video, self.text, self.timesteps, self.layout)
        return rows

    def __call__(self) -> Rows:
        """Run forward and backward; return the rows of each sample."""
        rows = self.forward()
        rows.backward(self.cotangent)
        return list(rows.detach().split([s.video_length for s in self.layout.samples[:-1]]))


class TheirBatch:
    """Some samples of a case, all of one size, as one batch through diffusers' model.

    Args:
        case, model: what is computed.
        places: the samples.
        size_of: the sample whose size all of them are given (padding to the longest): what the batch holds is drawn
            anew then, since the time doesn't depend on it, and its rows are no one's output. None: their own.
    """

    def __init__(
        self, case: Case, model: Any, places: range | tuple[int, ...], size_of: int | None = None
    ) -> None:  # fmt: skip
        self.case, self.model = case, model
        shown = list(places) if size_of is None else [size_of] * len(places)
        self.video = torch.stack([case.latents(place) for place in shown])
        self.text = torch.stack([case.text(place) for place in shown])
        self.timesteps = torch.tensor([case.timestep(place) for place in places], device=case.device)
        self.cotangent = torch.stack([self._image(case.cotangent(place), place) for place in shown])
        self.rotary = rotary_table(case, shown[0])

    def forward(self) -> torch.Tensor:
        """Return the velocity `[B, T, C, H, W]`."""
        result = self.model(self.video, self.text, self.timesteps, image_rotary_emb=self.rotary, return_dict=False)
        velocity: torch.Tensor = result[0]
        return velocity

    def __call__(self) -> Rows:
        """Run forward and backward; return the rows of each sample."""
        output = self.forward()
        output.backward(self.cotangent)
        return [patchify(sample, self.case.config.patch) for sample in output.detach()]

    def _image(self, rows: torch.Tensor, place: int) -> torch.Tensor:
        """Put rows back into the shape of diffusers' output, `[T, C, H, W]`."""
        return unpatchify(rows, self.case.layout.samples[place].grid, self.case.config.patch)


class OneByOne:
    """Several sides after each other as one: gradients add up, rows follow each other."""

    def __init__(self, sides: list[Callable[[], Rows]]) -> None:
        self.sides = sides

    def __call__(self) -> Rows:
        """Run them all."""
        return [rows for side in self.sides for rows in side()]


def rotary_table(case: Case, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return diffusers' (cos, sin), fp32 `[V, K]` each, positions counted from 0 in steps of 1."""
    frames, height, width = case.layout.samples[place].grid
    cos, sin = get_3d_rotary_pos_embed(
        case.config.attention_head_dim, None, (height, width), frames, grid_type="slice", max_size=(256, 256),
        device=case.device,
    )  # fmt: skip
    return cos, sin


def gradients(model: Any, config: CogVideoXConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (our name, gradient) of every parameter of either model."""
    state = {name: parameter.grad for name, parameter in model.named_parameters()}
    renamed = state if isinstance(model, CogVideoXTransformer) else to_our_names(state, config)
    yield from renamed.items()
