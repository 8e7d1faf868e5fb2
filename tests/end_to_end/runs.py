"""Whole runs as a list: what is started, on how many ranks, and how far.

A run is `train` of the same tiny model on the same dataset; all runs must see the same samples, timesteps and noise,
so their losses are equal but for rounding, step by step.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One start of the program: ranks, layout, and the step it stops at."""

    ranks: int
    stop: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Parts that follow one another in one run folder, each resuming from the last one's checkpoint."""

    name: str
    parts: tuple[Part, ...] = field(default_factory=tuple)


STEPS = 4
TENSOR, CONTEXT = ("parallel.tensor_parallel_size=2",), ("parallel.context_parallel_size=2",)
PIPELINE = ("parallel.pipeline_parallel_size=2",)

REFERENCE = Run("one process", (Part(1, STEPS),))
RUNS = (
    Run("tensor parallel, then context parallel", (Part(2, 2, TENSOR), Part(2, STEPS, CONTEXT))),
    Run("pipeline stages, then data parallel", (Part(2, 2, PIPELINE), Part(2, STEPS))),
)
