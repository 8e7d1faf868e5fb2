"""Our settings -> the config object that megatron-core wants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer import TransformerConfig

from megacogvx.errors import ConfigError
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.pipeline_parallel import split_layers

# of FP8's two formats: gradients in e5m2, all else e4m3; where scales are of blocks, e4m3 has range enough for all
FP8_FORMATS = {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


@dataclass
class CoreConfig(TransformerConfig):
    """megatron-core's settings, and what our models have to know beside them.

    Attributes:
        recompute: `parallel.recompute`; megatron-core's own settings of that name are for its own blocks.
        packed_attention_backend: `parallel.attention_backend`; megatron-core's own is for its own attention.
        stage_layers: which layers this rank's pipeline stage holds; all of them without stages.
    """

    recompute: str = "none"
    packed_attention_backend: str = "auto"
    stage_layers: range = range(0)


def core_config(
    *,
    hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    ffn_hidden_size: int,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    dtype: torch.dtype,
    norm_eps: float,
) -> CoreConfig:
    """Return megatron-core's settings for a transformer.

    Args:
        hidden_size: width of the tokens.
        num_layers: blocks.
        num_attention_heads: heads over all ranks.
        ffn_hidden_size: inner width of the MLP.
        parallel: config section `parallel`.
        groups: process groups.
        dtype: of the weights; `torch.float32`, `torch.bfloat16` or `torch.float16`.
        norm_eps: of the layer norms.

    Raises:
        ConfigError: the heads can't be cut over tensor and context ranks, or a pipeline stage would hold no layer.
    """
    if problem := parallel.head_problem(num_attention_heads):
        raise ConfigError(problem)
    stage, stages = groups.pipeline
    return CoreConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        ffn_hidden_size=ffn_hidden_size,
        layernorm_epsilon=norm_eps,
        tensor_model_parallel_size=groups.tensor[1],
        sequence_parallel=groups.tensor[1] > 1,
        context_parallel_size=groups.context[1],
        pipeline_model_parallel_size=stages,
        stage_layers=split_layers(num_layers, stages, parallel.pipeline_layers)[stage],
        pipeline_dtype=dtype,  # of the tensor between stages
        deallocate_pipeline_outputs=True,  # once it is sent
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        calculate_per_token_loss=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Weights come from initialize_weights alone: allocated here, on the host, then moved.
        use_cpu_initialization=True,
        perform_initialization=False,
        # Needs a CUDA extension of Apex; the sums in fp32 of the gradient buffers don't.
        gradient_accumulation_fusion=False,
        recompute=parallel.recompute,
        packed_attention_backend=parallel.attention_backend,
        transformer_impl=parallel.transformer_impl,
        fp8=FP8_FORMATS.get(parallel.fp8_recipe),
        fp8_recipe=parallel.fp8_recipe if parallel.fp8_recipe in FP8_FORMATS else "delayed",  # not read without fp8
        cuda_graph_scope=[],
    )


def plain_core_config(parallel: ParallelConfig, groups: ParallelGroups, dtype: torch.dtype) -> CoreConfig:
    """Return megatron-core's settings for a model without attention.

    Data parallelism, optimizer and schedule read them; the sizes of a transformer in them mean nothing.
    """
    return core_config(
        hidden_size=parallel.stage_size,
        num_layers=parallel.pipeline_parallel_size,
        num_attention_heads=parallel.stage_size,
        ffn_hidden_size=parallel.stage_size,
        parallel=parallel,
        groups=groups,
        dtype=dtype,
        norm_eps=1e-5,
    )
