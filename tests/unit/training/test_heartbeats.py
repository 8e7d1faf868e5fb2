"""Heartbeats reach nvidia-resiliency-ext's monitor: a stand-in of its client, and the package itself where it is."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest

from megacogvx.errors import AgreedError
from megacogvx.training import agreement
from megacogvx.training.guard import GuardConfig
from megacogvx.training.heartbeats import heartbeats

INSTALLED = importlib.util.find_spec("nvidia_resiliency_ext") is not None


class ClientError(Exception):
    """Stands for RankMonitorClientError."""


class Client:
    """Stands for RankMonitorClient of nvidia-resiliency-ext 0.4.1: the three methods that a rank calls."""

    def __init__(self):
        self.calls, self.is_gone = [], False
        Client.last = self

    def init_workload_monitoring(self):
        if Client.refuses:
            raise ClientError("FT_RANK_MONITOR_IPC_SOCKET env variable should be set")
        self.calls.append("init")

    def send_heartbeat(self):
        if self.is_gone:
            raise ClientError("could not send the heartbeat")
        self.calls.append("beat")

    def shutdown_workload_monitoring(self):
        self.calls.append("shutdown")


@pytest.fixture
def client(monkeypatch):
    module = SimpleNamespace(RankMonitorClient=Client, RankMonitorClientError=ClientError)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", SimpleNamespace(fault_tolerance=module))
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", module)
    monkeypatch.setattr(agreement, "any_rank", lambda condition, groups: condition)
    monkeypatch.setattr(agreement, "gather_json", lambda value, groups: [value])
    Client.refuses, Client.last = False, None
    return Client


def test_a_rank_connects_beats_and_takes_its_leave(client):
    with heartbeats(True, None) as beats:
        beats.beat()
        beats.beat()
    assert client.last.calls == ["init", "beat", "beat", "shutdown"]


def test_without_the_setting_nothing_is_sent(client):
    with heartbeats(False, None) as beats:
        beats.beat()
    assert client.last is None


def test_a_run_that_ft_launcher_did_not_start_is_told_how(client):
    client.refuses = True
    with pytest.raises(AgreedError, match=r"launcher_heartbeats=true.*FT_RANK_MONITOR_IPC_SOCKET.*ft_launcher"):
        heartbeats(True, None)


def test_a_monitor_that_is_gone_does_not_end_the_training(client):
    with heartbeats(True, None) as beats:
        client.last.is_gone = True
        beats.beat()
        client.last.is_gone = False
        beats.beat()
    assert client.last.calls == ["init"]


def test_the_setting_asks_for_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="nvidia-resiliency-ext is not installed"):
        GuardConfig(launcher_heartbeats=True)
    assert not GuardConfig().launcher_heartbeats


RANK = """
    import sys, time
    from megacogvx.training import agreement
    from megacogvx.training.heartbeats import heartbeats
    agreement.any_rank = lambda condition, groups: condition

    with heartbeats(True, None) as beats:
        for _ in range(20):  # more than the limit in all, each pause less
            beats.beat()
            time.sleep(0.2)
        print("went on", flush=True)
        time.sleep(120)  # hangs
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="pip install '.[resiliency]' brings nvidia-resiliency-ext")
def test_the_packages_own_monitor_ends_a_rank_without_heartbeats(tmp_path):
    from nvidia_resiliency_ext.fault_tolerance import FaultToleranceConfig, RankMonitorServer

    config = FaultToleranceConfig(initial_rank_heartbeat_timeout=60.0, rank_heartbeat_timeout=3.0)
    config.workload_check_interval = 0.5
    socket = str(tmp_path / "monitor.socket")
    monitor = RankMonitorServer.run_in_subprocess(config, socket, mp_ctx=multiprocessing.get_context("spawn"))
    try:
        environment = {**os.environ, "FT_RANK_MONITOR_IPC_SOCKET": socket, "RANK": "0", "LOCAL_RANK": "0"}
        words = [sys.executable, "-c", textwrap.dedent(RANK)]
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=110)
    finally:
        monitor.kill()
        monitor.join()
    assert "went on" in ended.stdout, ended.stderr
    assert ended.returncode < 0, f"ended with {ended.returncode}, not by the monitor\n{ended.stderr}"
