"""One rank of a training with planted faults: what `faults.py` starts by itself, and torchrun with `-m`."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacogvx.testing import spawn
from megacogvx.testing.fault_points import Fault

LAST_SECONDS = 900.0  # after which faulthandler ends a rank that nobody else ends


def run_rank(config: dict[str, Any], output: Path, environment: Mapping[str, Any], faults: list[Fault]) -> None:
    """Do what `megacogvx train` does, as one rank."""
    os.setsid()
    os.environ.update({name: str(value) for name, value in environment.items()})
    spawn.write_to(output)
    faulthandler.dump_traceback_later(LAST_SECONDS, exit=True)
    status = 1
    try:
        _note_consumed(Path(config["training"]["run_folder"]), environment["RANK"], environment["STARTED"])
        for fault in faults:
            fault.plant()
        status = _train(config)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _train(config: dict[str, Any]) -> int:
    from megacogvx.config import build_config
    from megacogvx.errors import MegacogvxError
    from megacogvx.training.config import TrainConfig
    from megacogvx.training.train import pretrain

    try:
        pretrain(build_config(TrainConfig, config))
    except MegacogvxError as error:
        print(f"{type(error).__name__}: {error}")
        return error.exit_status
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _note_consumed(run: Path, rank: int, started: float) -> None:
    """Append the sample ids of each step that this rank has done to RUN/consumed-RANK.jsonl.

    It also asks that no step moves a running generator: a checkpoint holds none, since nothing draws from one.
    """
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megacogvx.training import loop

    advance, generators = loop._advance, list[torch.Tensor]()

    def noted(state: Any, inputs: Any) -> None:
        now = [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]
        assert not generators or all(torch.equal(a, b) for a, b in zip(now, generators, strict=True)), "a draw"
        generators[:] = now
        ids = [sample for ids in inputs.sample_ids for sample in ids]
        first = inputs.microbatches[0][0].place
        with (run / f"consumed-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([state.step, started, first, ids]) + "\n")
        advance(state, inputs)

    loop._advance = noted


def main() -> int:
    """Be one rank under torchrun; the faults of the plan are for the first time that it starts the ranks."""
    plan, rank = json.loads(Path(sys.argv[1]).read_text()), int(os.environ["RANK"])
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    _note_consumed(Path(plan["config"]["training"]["run_folder"]), rank, float(restarts))
    for fault in [Fault(**settings) for settings in plan["faults"]] if restarts == 0 else []:
        if fault.rank in (None, rank):
            fault.plant()
    return _train(plan["config"])


if __name__ == "__main__":
    sys.exit(main())
