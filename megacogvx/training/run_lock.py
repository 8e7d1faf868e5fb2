"""One run at a time in a run folder: a second one would delete what the first is writing.

The lock is a POSIX record lock (`fcntl.lockf`) on RUN/run.lock. The kernel drops it when its process ends, however
that happens, so a lock is never stale; NFS keeps it on the server, for all machines (NFS 4, or 3 with lockd), and gives
it up with the lease of a machine that died, for which a run that starts elsewhere waits. A file made with O_EXCL would
outlive a killed run, and whoever finds it had to guess from a heartbeat whether its owner lives; `flock` would be
inherited by the processes that a run forks, which may outlive it. A file system without locks (Lustre without
`-o flock`) is told of, and trusted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megacogvx.errors import LaunchError
from megacogvx.log import get_logger

NAME = "run.lock"
LEASE_SECONDS = 150.0  # of NFS servers, 90 by default, and a margin
PAUSE_SECONDS = 3.0
TAKEN = (errno.EACCES, errno.EAGAIN)
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

logger = get_logger(__name__)


class RunLock:
    """Holds a run folder until it is released or the process ends; only one of a run's processes takes it.

    Args:
        folder: the run folder; made if it isn't there.
        lease: seconds to wait for a lock that another machine took, which may have died.
        pause: seconds between two tries.

    Raises:
        LaunchError: another process holds it; named by host, process id and start.
        OSError: the folder can't be written.
    """

    def __init__(self, folder: Path, lease: float = LEASE_SECONDS, pause: float = PAUSE_SECONDS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._take(lease, pause)
        except OSError as error:
            holder = self._holder()
            self.release()
            if error.errno in TAKEN:
                raise LaunchError(
                    f"{folder} is in use by another run ({_told(holder)}); wait for its end, stop it, or take another "
                    "training.run_folder"
                ) from None
            if error.errno not in UNSUPPORTED:
                raise
            logger.warning("%s has no file locks (%s): see to it that no other run uses it", folder, error.strerror)
            return
        self._sign()

    def release(self) -> None:
        """Let the folder go; the file stays, since another process may be waiting for it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, lease: float, pause: float) -> None:
        """Take the lock; wait for one of another machine, which may be dead, as long as its server keeps it."""
        assert self._descriptor is not None
        ends = time.monotonic() + lease
        is_told = False
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                holder = self._holder()
                is_elsewhere = holder.get("host") not in (None, socket.gethostname())
                if error.errno not in TAKEN or not is_elsewhere or time.monotonic() >= ends:
                    raise
            if not is_told:
                logger.warning(
                    "%s is held (%s); waiting %g s, should its machine be dead", self.path, _told(holder), lease
                )
                is_told = True
            time.sleep(pause)

    def _sign(self) -> None:
        """Say who holds it."""
        assert self._descriptor is not None
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(me).encode(), 0)

    def _holder(self) -> dict[str, Any]:
        assert self._descriptor is not None
        try:
            who = json.loads(os.pread(self._descriptor, 4096, 0))
        except (OSError, ValueError):
            return {}
        return who if isinstance(who, dict) else {}


def _told(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "started"} <= holder.keys():
        return "it has not said which"
    return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
