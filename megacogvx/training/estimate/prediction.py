"""What a training costs on a machine: memory, seconds of a step by cause, utilisation, GPU-hours."""

from __future__ import annotations

from dataclasses import dataclass

from megacogvx.errors import ConfigError, LaunchError
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.flops import BACKWARD, forward_flops, pair_flops, training_flops
from megacogvx.pack_layout import PackLayout
from megacogvx.parallel.config import ParallelConfig
from megacogvx.training.config import TrainConfig
from megacogvx.training.estimate.communication import Axis, Traffic, communication
from megacogvx.training.estimate.machine import Machine
from megacogvx.training.estimate.memory import FP32, Memory, Ops, memory, stage_layers
from megacogvx.training.estimate.parameters import local_sizes
from megacogvx.training.estimate.workload import Workload

FILL = 0.94  # of a GPU's memory that a run may count on
VAE_ENCODER, T5_XXL_ENCODER = 92_215_456, 4_762_310_656  # parameters
RESERVE = 5_000_000_000  # bytes of CUDA context, NCCL buffers and what the allocator can't use
ELEMENTWISE = {"fused": 42, "reference": 133}  # bytes moved by a block's forward pass outside products, x D x tokens
GELU = 16  # of these, GELU's
OPTIMIZER_BYTES = 34  # moved per parameter of a rank's share: fp32 weight, moments and gradient read, three written


@dataclass(frozen=True)
class Prediction:
    """What one layout costs.

    Attributes:
        parallel: the layout.
        replicas: data-parallel.
        packs: of a step.
        memory: of the fullest rank.
        traffic: of the rank that sends most.
        seconds: of a step, by cause.
        mfu: model FLOPs over the machines' peak, without recomputation and padding.
        broken: which rules of the config it breaks.
    """

    parallel: ParallelConfig
    replicas: int
    packs: int
    memory: Memory
    traffic: list[Traffic]
    seconds: dict[str, float]
    mfu: float
    broken: str

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return sum(self.seconds.values())

    def fits(self, machine: Machine) -> bool:
        """Whether the fullest rank stays within what a run may count on."""
        return self.memory.total <= FILL * machine.memory


def predict(
    config: TrainConfig, work: Workload, machine: Machine, gpus: int, ops: Ops = "fused", bytes_per_weight: int = 2
) -> Prediction:
    """Return what `config` costs on `gpus` GPUs, by its own layout.

    Args:
        config: a training's.
        work: the packs of a step.
        machine: the GPU.
        gpus: all of them.
        ops: which inventory of ops computes.
        bytes_per_weight: 2 for bf16, 4 for fp32.

    Raises:
        ConfigError: the layers can't be split over the stages, or there are fewer GPUs than a replica takes.
    """
    parallel = config.parallel
    if gpus < parallel.replica_size:
        raise ConfigError(f"a replica of this layout takes {parallel.replica_size} GPUs, --gpus is {gpus}")
    replicas = gpus // parallel.replica_size
    per_replica = -(-work.packs // replicas)
    costliest = max(work.layouts, key=lambda layout: forward_flops(config.model, layout))
    stages = range(parallel.pipeline_parallel_size)
    size = {"data_size": replicas, "bytes_per_weight": bytes_per_weight}
    memories = [
        memory(config.model, parallel, costliest, stage=stage, packs_per_replica=per_replica, ops=ops,
               reserve=RESERVE, averages=config.ema.decay > 0, frozen=frozen_parameters(config, work), **size)
        for stage in stages
    ]  # fmt: skip
    traffics = [
        communication(config.model, parallel, work.layouts, stage=stage, packs=per_replica, **size) for stage in stages
    ]
    traffic = max(traffics, key=lambda entries: sum(entry.sent for entry in entries))
    compute = _compute_seconds(config.model, parallel, costliest, machine, per_replica, ops)
    seconds = {
        **compute,
        **_traffic_seconds(parallel, traffic, machine, behind=sum(compute.values()) / per_replica / 2),
        "optimizer": _optimizer_seconds(config.model, parallel, replicas, machine),
    }
    mean_flops = sum(training_flops(config.model, layout) for layout in work.layouts) / len(work.layouts)
    mfu = mean_flops * work.packs / (sum(seconds.values()) * gpus * machine.peak)
    return Prediction(
        parallel, replicas, work.packs, max(memories, key=lambda entry: entry.total), traffic, seconds, mfu,
        broken_rules(config, work, gpus),
    )  # fmt: skip


def broken_rules(config: TrainConfig, work: Workload, gpus: int) -> str:
    """Return what doesn't divide, in the words of the config's own rules; "" where everything does."""
    data = config.data.model_copy(update={"packs_per_step": work.packs, "samples_per_step": None})
    try:
        config.model_copy(update={"data": data}).validate_layout(gpus)
    except (ConfigError, LaunchError) as error:
        return str(error)
    return ""


def _compute_seconds(
    model: CogVideoXConfig, parallel: ParallelConfig, layout: PackLayout, machine: Machine, packs: int, ops: Ops
) -> dict[str, float]:
    """Return seconds that the costliest pack's matrix products, attention and elementwise ops take, times the packs.

    With stages, the fullest one sets the pace and the first and last packs leave the others idle.
    """
    stages = parallel.pipeline_parallel_size
    fullest = max(len(stage_layers(model, parallel, stage)) for stage in range(stages)) / model.num_layers
    share = packs * fullest / parallel.stage_size
    squares = sum(sample.length**2 for sample in layout.samples[:-1])
    attention = pair_flops(model) * squares
    products = forward_flops(model, layout, padding=True) - attention
    moved = ELEMENTWISE[ops] * model.hidden_size * layout.num_tokens * model.num_layers
    again = _computed_again(model, parallel, ops)
    seconds = {
        "matrix products": share
        * products
        * (1 + BACKWARD + again["products"])
        / (machine.peak * machine.matrix_share),
        "attention": share * attention * (1 + BACKWARD + again["attention"]) / (machine.peak * machine.attention_share),
        "elementwise": share * moved * (1 + BACKWARD + again["elementwise"]) / machine.bandwidth,
    }
    if stages > 1:
        seconds["idle stages"] = sum(seconds.values()) * (stages - 1) / packs
    return seconds


def _computed_again(model: CogVideoXConfig, parallel: ParallelConfig, ops: Ops) -> dict[str, float]:
    """Return which share of a forward pass the recompute policy repeats; our own MLP always repeats GELU."""
    policy, whole = parallel.recompute, 0.0
    if policy.startswith("block:"):
        whole = min(1.0, int(policy.removeprefix("block:")) * parallel.pipeline_parallel_size / model.num_layers)
    elif policy == "full":
        whole = 1.0
    kept, selective = policy == "keep_attention", policy == "selective"
    gelu = 0.0 if selective or parallel.transformer_impl != "local" else GELU / ELEMENTWISE[ops]
    return {
        "products": 1.0 if kept else whole,
        "attention": whole,
        "elementwise": (1.0 if kept or selective else whole) + gelu,
    }


def _traffic_seconds(
    parallel: ParallelConfig, traffic: list[Traffic], machine: Machine, behind: float
) -> dict[str, float]:
    """Return seconds of what is sent and not computed meanwhile, by axis.

    With `parallel.overlap_grad_reduce` the gradients travel during `behind`, the backward pass of the last pack (taken
    as half of its time), but for the bucket that ends with it; nothing else is assumed to overlap.
    """
    seconds: dict[str, float] = {}
    buckets = []
    for entry in traffic:
        rate = machine.inside if reach(parallel, entry.axis, entry.ranks) <= machine.node else machine.between
        name = f"{entry.axis} ranks".replace("_", " x ")
        seconds[name] = seconds.get(name, 0.0) + entry.sent / rate
        if entry.term == "gradients":
            buckets.append(entry.sent / rate)
    if parallel.overlap_grad_reduce and buckets:
        seconds["data x context ranks"] -= min(sum(buckets[:-1]), behind)
    return seconds


def reach(parallel: ParallelConfig, axis: Axis, ranks: int) -> int:
    """Return over how many neighbouring ranks a group spreads.

    Tensor ranks are innermost, then context ranks (those that exchange heads, then the rings), data ranks, stages.

    Args:
        parallel: the layout.
        axis: of the group.
        ranks: its size.
    """
    tensor = parallel.tensor_parallel_size
    inner = {"tensor": 1, "context": tensor, "ring": tensor * parallel.ulysses_size, "data_context": tensor}
    return ranks * inner.get(axis, 10**9)  # stages are as far apart as ranks can be


def frozen_parameters(config: TrainConfig, work: Workload) -> int:
    """Return the parameters of the frozen encoders that run beside the training, of the published sizes.

    A T5 that encodes the empty prompt alone is gone before the model is built.
    """
    return int(config.is_image_to_video) * VAE_ENCODER + int(work.token_ids) * T5_XXL_ENCODER


def _optimizer_seconds(model: CogVideoXConfig, parallel: ParallelConfig, replicas: int, machine: Machine) -> float:
    stages = range(parallel.pipeline_parallel_size)
    largest = max(sum(local_sizes(model, parallel, stage)) for stage in stages)
    share = largest / (replicas * parallel.context_parallel_size)
    cleared = largest * FP32  # the gradient buffer, before every step
    return (share * OPTIMIZER_BYTES + cleared) / machine.bandwidth
