"""Heartbeats to nvidia-resiliency-ext's `ft_launcher`, for clusters whose jobs it starts; the package is optional.

The launcher runs a monitor beside each rank. It ends a rank from which no heartbeat has come for the launcher's
`--ft-rank-heartbeat-timeout`, and starts the job again, which then goes on from its newest checkpoint. Written
against `fault_tolerance/rank_monitor_client.py` of nvidia-resiliency-ext 0.4.1, the last version with wheels for Python
3.11. Rank and monitor talk over a Unix socket that the launcher makes.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from megacogvx.errors import LaunchError
from megacogvx.log import get_logger
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.training.agreement import agreed

logger = get_logger(__name__)


class Heartbeats:
    """Sends heartbeats while it is entered as a context.

    Args:
        client: a connected `RankMonitorClient`; None sends nothing.
    """

    def __init__(self, client: Any = None) -> None:
        self._client = client

    def __enter__(self) -> Heartbeats:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.shutdown_workload_monitoring()

    def beat(self) -> None:
        """Say that this rank goes on. A monitor that is gone is told of once, and the training doesn't end for it."""
        if self._client is None:
            return
        try:
            self._client.send_heartbeat()
        except Exception as error:  # RankMonitorClientError, whose module is there only with the package
            logger.warning("ft_launcher's monitor of this rank takes no heartbeats any more: %s", error)
            self._client = None


def heartbeats(wanted: bool, groups: ParallelGroups) -> Heartbeats:
    """Connect this rank to its monitor, if that is wanted; every rank calls it.

    Raises:
        AgreedError: the run was not started by `ft_launcher`.
    """
    client = None
    if wanted:
        with agreed(groups, "connecting to ft_launcher"):
            client = _connect()
    return Heartbeats(client)


def _connect() -> Any:
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient, RankMonitorClientError

    client = RankMonitorClient()
    try:
        client.init_workload_monitoring()
    except (RankMonitorClientError, OSError) as error:
        raise LaunchError(
            f"guard.launcher_heartbeats=true, but no monitor of ft_launcher answers ({error}); start with "
            "`ft_launcher` in torchrun's place, or set it to false"
        ) from None
    return client
