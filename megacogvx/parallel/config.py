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
        device: "auto" takes the GPUs if the machine has at least one per local process, else the CPU.
        timeout_minutes: a collective that takes longer fails, in minutes.
        recompute: "full" keeps only the input of each block and computes the rest again in the backward pass.
    """

    tensor_parallel_size: int = Field(1, ge=1)
    context_parallel_size: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = Field(10.0, gt=0)
    recompute: Literal["none", "full"] = "none"

    @property
    def replica_size(self) -> int:
        """Processes that hold one copy of the model: tensor x context ranks."""
        return self.tensor_parallel_size * self.context_parallel_size
