"""Config section `parallel`: sizes of the axes over which one model is spread."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megacogvx.config import Section


class ParallelConfig(Section):
    """How one model is spread over the processes of a run; what is left over is data parallel.

    Attributes:
        tensor_parallel_size: ranks that share each linear layer; above 1 they share the tokens too (sequence
            parallelism).
        context_parallel_size: ranks that share the tokens of one pack, attention exchanging heads for tokens; in a
            VAE run, ranks that share the frames of one clip, convolutions exchanging halos.
        pipeline_parallel_size: stages, each of which holds some of the layers; packs flow through them.
        pipeline_layers: layers of each stage, such as [9, 11, 11, 11]; None splits as evenly as possible.
        device: "auto" takes the GPUs if the machine has at least one per local process, else the CPU.
        timeout_minutes: a collective that takes longer fails, in minutes.
        recompute: what is computed again in the backward pass instead of being kept. "selective": the elementwise
            parts (norms with modulation, QK-norm with rotation, gates, GELU); "keep_attention": everything of a block
            but the attention itself; "full": each block from its input; "block:N": the same for the first N blocks of
            each pipeline stage.
    """

    tensor_parallel_size: int = Field(1, ge=1)
    context_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    pipeline_layers: tuple[int, ...] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = Field(10.0, gt=0)
    recompute: str = Field("none", pattern=r"^(none|selective|keep_attention|full|block:[1-9]\d*)$")

    @property
    def stage_size(self) -> int:
        """Processes that share the tokens and heads of one pipeline stage: tensor x context ranks."""
        return self.tensor_parallel_size * self.context_parallel_size

    @property
    def replica_size(self) -> int:
        """Processes that hold one copy of the model: tensor x context ranks x pipeline stages."""
        return self.stage_size * self.pipeline_parallel_size
