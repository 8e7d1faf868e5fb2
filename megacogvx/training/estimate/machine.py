"""GPUs that a prediction knows: memory, peak, bandwidths, and how much of the peak matrix products and attention reach.

Peaks, memory and bandwidths are the vendor's data sheets (dense bf16, one direction of NVLink, one 400 or 200 Gb/s
network card per GPU). What of the peak is reached was measured on H100s: matrix products 0.71 (700 of 989 TFLOP/s),
attention with 64 channels a head 0.42 (413, cuDNN's figure of 2024, forward without mask; 0.33 for FlashAttention 2,
0.50 for FlashAttention 3). Other GPUs are assumed to reach the same shares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megacogvx.errors import ConfigError

GiB = 2**30
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Machine:
    """One GPU and its place in a cluster; rates are per second.

    Attributes:
        name: of the GPU.
        memory: usable bytes.
        peak: dense bf16 FLOPs.
        bandwidth: bytes of its memory read and written, as a copy reaches.
        inside: bytes sent to GPUs of the same node, one direction.
        between: bytes sent to other nodes, one direction.
        node: GPUs of a node.
        matrix_share, attention_share: of the peak that matrix products and attention reach.
    """

    name: str
    memory: float
    peak: float
    bandwidth: float
    inside: float
    between: float
    node: int = 8
    matrix_share: float = 0.71
    attention_share: float = 0.42


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("a100-80", 79.3 * GiB, 312 * TERA, 0.9 * 2.04 * TERA, 300 * GIGA, 25 * GIGA),
        Machine("h100-80", 79.6 * GiB, 989.4 * TERA, 0.9 * 3.35 * TERA, 450 * GIGA, 50 * GIGA),
        Machine("h200-141", 140.4 * GiB, 989.4 * TERA, 0.9 * 4.8 * TERA, 450 * GIGA, 50 * GIGA),
    )
}


def machine(
    name: str, *, node: int | None = None, matrix_tflops: float | None = None, attention_tflops: float | None = None
) -> Machine:
    """Return a GPU by name, with measured rates in place of the assumed ones where they are given.

    Args:
        name: one of `MACHINES`.
        node: GPUs of a node.
        matrix_tflops, attention_tflops: what was measured, in 1e12 FLOPs a second.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in MACHINES:
        raise ConfigError(f"GPU {name!r} is unknown; known ones: {', '.join(MACHINES)}")
    found = MACHINES[name]
    return replace(
        found,
        node=node or found.node,
        matrix_share=matrix_tflops * TERA / found.peak if matrix_tflops else found.matrix_share,
        attention_share=attention_tflops * TERA / found.peak if attention_tflops else found.attention_share,
    )
