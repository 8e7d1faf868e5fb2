"""Only one run at a time in a run folder; the other run is a real process: none stands in its own way."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading

import pytest

from megacogvx.errors import LaunchError
from megacogvx.training.run_lock import NAME, RunLock

HOLD = """
import sys
from pathlib import Path
from megacogvx.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_run_is_told_who_has_the_folder_and_a_killed_one_leaves_it(holder, tmp_path):
    with pytest.raises(
        LaunchError, match=rf"in use by another run \(process {holder.pid} on {os.uname().nodename}, st"
    ):
        RunLock(tmp_path / "run")
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path / "run")
    assert str(os.getpid()) in (tmp_path / "run" / NAME).read_text()
    lock.release()
    lock.release()


def test_a_run_of_another_machine_may_be_dead_and_is_waited_for(holder, tmp_path):
    """Its server keeps the lock for the length of a lease."""
    path = tmp_path / "run" / NAME
    path.write_text(path.read_text().replace(os.uname().nodename, "another-host"))
    with pytest.raises(LaunchError, match="on another-host"):
        RunLock(tmp_path / "run", lease=0.2, pause=0.05)
    threading.Timer(0.3, holder.kill).start()
    RunLock(tmp_path / "run", lease=60.0, pause=0.05).release()


def test_a_forked_writer_does_not_keep_the_folder(tmp_path):
    """What a killed run leaves behind, a writer, must not keep the next run out."""
    script = HOLD.replace(
        'print("held", flush=True)', 'import os, time\nif not os.fork(): time.sleep(60)\nprint("held", flush=True)'
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert first.stdout.readline() == "held\n"
        first.kill()
        first.wait()
        RunLock(tmp_path).release()
    finally:
        os.killpg(first.pid, 9)
        first.stdout.close()
        first.stdin.close()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def lockf(descriptor, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(logging.getLogger("megacogvx"), "propagate", True)
    RunLock(tmp_path)
    assert "no file locks" in caplog.text


def test_other_errors_come_as_they_are(tmp_path, monkeypatch):
    def lockf(descriptor, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(OSError, match="Input/output"):
        RunLock(tmp_path)
