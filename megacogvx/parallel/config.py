"""Config section `parallel`: sizes of the axes over which one model is spread."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megacogvx.config import Section


class ParallelConfig(Section):
    """How one model is spread over the processes of a run; what is left over is data parallel.

    Attributes:
        tensor_parallel_size: ranks that share each linear layer; above 1 they share the tokens too (sequence
            parallelism).
        context_parallel_size: ranks that share the tokens of one pack, attention exchanging heads for tokens; in a
            VAE run, ranks that share the frames of one clip, convolutions exchanging halos.
        ring_size: of the context ranks, how many hold keys and values of other tokens each, which they exchange in a
            ring, instead of heads for tokens; for more context ranks than there are heads. 24 context ranks with
            rings of 4 exchange heads among 6.
        pipeline_parallel_size: stages, each of which holds some of the layers; packs flow through them.
        pipeline_layers: layers of each stage, such as [9, 11, 11, 11]; None splits as evenly as possible.
        device: "auto" takes the GPUs if the machine has at least one per local process, else the CPU.
        timeout_minutes: a collective that takes longer fails, in minutes.
        recompute: what is computed again in the backward pass instead of being kept. "selective": the elementwise
            parts (norms with modulation, QK-norm with rotation, gates, GELU); "keep_attention": everything of a block
            but the attention itself; "full": each block from its input; "block:N": the same for the first N blocks of
            each pipeline stage.
        data_parallel: how gradients and optimizer states lie on the data ranks. "distributed_optimizer": every rank
            holds the weights, and a share of the states (ZeRO stage 1); "megatron_fsdp" is refused, with the reason.
        overlap_grad_reduce: reduce each bucket of gradients while the backward pass goes on.
        attention_backend: the kernel of `packed_attention`; "auto" chooses for each pack: on Hopper FlashAttention 3
            where it is installed, else one dense cuDNN call a sample where samples are long, else a kernel for
            samples of unequal length; "reference" elsewhere.
        transformer_impl: whose linear layers: megatron-core's own ("local"), or Transformer Engine's.
        fp8_recipe: how Transformer Engine's linear layers scale FP8; "none": they stay in the weights' precision. The
            recipes have no history, so recompute and resumed runs give the same.
    """

    tensor_parallel_size: int = Field(1, ge=1)
    context_parallel_size: int = Field(1, ge=1)
    ring_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    pipeline_layers: tuple[int, ...] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_minutes: float = Field(10.0, gt=0)
    recompute: str = Field("none", pattern=r"^(none|selective|keep_attention|full|block:[1-9]\d*)$")

    data_parallel: Literal["distributed_optimizer", "megatron_fsdp"] = "distributed_optimizer"
    overlap_grad_reduce: bool = False
    attention_backend: Literal["auto", "reference", "cudnn", "flash2", "flash3", "varlen", "transformer_engine"] = (
        "auto"
    )
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    fp8_recipe: Literal["none", "tensorwise", "blockwise", "mxfp8"] = "none"

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        """Check what one size demands of another."""
        if self.context_parallel_size % self.ring_size:
            raise ValueError(
                f"ring_size={self.ring_size} doesn't divide context_parallel_size={self.context_parallel_size}, whose "
                f"ranks it groups; sizes that work: {divisors(self.context_parallel_size)}"
            )
        if self.ring_size > 1 and self.attention_backend not in ("auto", "reference"):
            raise ValueError(
                f"attention_backend={self.attention_backend} doesn't return what ring_size={self.ring_size} has to "
                "merge; use attention_backend=auto, or ring_size=1"
            )
        if self.data_parallel == "megatron_fsdp":
            raise ValueError(
                "data_parallel=megatron_fsdp is not offered: megatron-core 0.16.1 wraps models in Megatron-FSDP on "
                "CUDA devices alone, so no test here can hold its gradients to those of one process; use "
                "data_parallel=distributed_optimizer, and for less memory tensor_parallel_size, pipeline_parallel_size "
                "or recompute"
            )
        if self.fp8_recipe != "none" and self.transformer_impl != "transformer_engine":
            raise ValueError(
                f"fp8_recipe={self.fp8_recipe} needs transformer_impl=transformer_engine, not "
                f"{self.transformer_impl}; or set fp8_recipe=none"
            )
        return self

    @property
    def ulysses_size(self) -> int:
        """Context ranks that exchange heads for tokens: all but what the rings take."""
        return self.context_parallel_size // self.ring_size

    def head_problem(self, heads: int) -> str | None:
        """Return why `heads` attention heads can't be cut over these ranks, and what would work; None if they can."""
        tensor, context = self.tensor_parallel_size, self.context_parallel_size
        if heads % (tensor * self.ulysses_size) == 0:
            return None
        rings = [ring for ring in _divisors(context) if heads % (tensor * (context // ring)) == 0]
        ring = f" / parallel.ring_size={self.ring_size}" if self.ring_size > 1 else ""
        instead = f"; or parallel.ring_size={rings[0]} for these context ranks" if rings else ""
        return (
            f"model.num_attention_heads={heads} cannot be split over parallel.tensor_parallel_size={tensor} x "
            f"parallel.context_parallel_size={context}{ring} = {tensor * self.ulysses_size}; "
            f"products that work: {divisors(heads)}{instead}"
        )

    @property
    def stage_size(self) -> int:
        """Processes that share the tokens and heads of one pipeline stage: tensor x context ranks."""
        return self.tensor_parallel_size * self.context_parallel_size

    @property
    def replica_size(self) -> int:
        """Processes that hold one copy of the model: tensor x context ranks x pipeline stages."""
        return self.stage_size * self.pipeline_parallel_size


def divisors(number: int) -> str:
    """Return the divisors of `number` as text, for messages."""
    return ", ".join(map(str, _divisors(number)))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
