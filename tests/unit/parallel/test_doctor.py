import dataclasses

import pytest
import torch

from megacogvx.errors import LaunchError
from megacogvx.parallel import doctor
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


def test_a_healthy_folder_is_written_read_and_left_clean(tmp_path):
    found = doctor.write_test(tmp_path / "run", 3, size=1 << 16)
    assert not found.problem and "MB/s" in found.value
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    found = doctor.write_test(tmp_path / "file", 0, size=1 << 10)
    assert str(tmp_path / "file") in found.problem and "choose another folder" in found.problem


def test_little_shared_memory_is_a_warning(tmp_path):
    assert "--ipc=host" in doctor.shared_memory(tmp_path, ranks=10**6).warning
    assert not doctor.shared_memory(tmp_path, ranks=0).warning


def test_few_open_files_are_a_warning(monkeypatch):
    for soft, warns in ((1024, True), (1 << 20, False), (doctor.resource.RLIM_INFINITY, False)):
        monkeypatch.setattr(doctor.resource, "getrlimit", lambda _, soft=soft: (soft, 1 << 20))
        assert bool(doctor.open_files().warning) is warns


def test_locked_memory_matters_on_gpus(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (65536, 65536))
    assert "unlimited" in doctor.locked_memory(torch.device("cuda")).warning
    assert not doctor.locked_memory(torch.device("cpu")).warning


def test_missing_gpu_libraries_matter_on_gpus(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "apex" else object())
    assert "apex" in doctor.gpu_libraries(torch.device("cuda")).warning
    assert not doctor.gpu_libraries(torch.device("cpu")).warning


def test_ops_that_are_not_compiled_for_gpus_matter_on_gpus(monkeypatch):
    for there, device, warns in (({"cpu"}, "cuda", True), ({"cpu", "cuda"}, "cuda", False), ({"cpu"}, "cpu", False)):
        monkeypatch.setattr(doctor.compiled, "available", lambda there=there: there)
        assert bool(doctor.compiled_ops(torch.device(device)).warning) is warns


def test_versions_name_torch():
    assert f"torch {torch.__version__}" in doctor.versions().value


def test_one_process_is_examined_and_reported(tmp_path, groups):
    findings = doctor.examine(tmp_path, groups, 1 << 16)
    assert {"versions", "shared memory", "open files", "clock", "write test", "all-reduce"} <= {
        finding.name for finding in findings
    }
    assert not any(finding.problem for finding in findings)
    doctor.report(findings, groups)


def test_a_problem_ends_the_check_and_names_machine_and_rank(groups):
    findings = [doctor.Finding("x", "1", warning="slow"), doctor.Finding("y", "2", problem="disk is full; free some")]
    with pytest.raises(LaunchError, match=r"rank 0: disk is full; free some"):
        doctor.report(findings, groups)
    doctor.report([dataclasses.replace(finding, problem="") for finding in findings], groups)
