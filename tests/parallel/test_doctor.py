"""Several ranks examine their machines: what only shows between them."""

import time

import pytest

from megacogvx.errors import LaunchError
from megacogvx.testing.spawn import on_ranks


@on_ranks(2)
def test_two_healthy_ranks(groups, folder):
    from megacogvx.parallel import doctor

    findings = doctor.examine(folder, groups, 1 << 16)
    assert not any(finding.problem for finding in findings)
    assert "over 2 ranks" in findings[-1].value
    doctor.report(findings, groups)


@on_ranks(2)
def test_what_differs_between_ranks_is_found(groups, folder):
    from megacogvx.parallel import doctor

    late = time.time() - 100 * groups.rank
    assert "rank 1's is the slowest" in doctor.clock(groups, lambda: late).warning
    (folder / f"own-{groups.rank}").mkdir()
    assert "rank(s) 1 don't see" in doctor.shared_folder(folder / f"own-{groups.rank}", groups).problem
    problem = "bad disk" if groups.rank == 1 else ""
    with pytest.raises(LaunchError, match="rank 1: bad disk"):
        doctor.report([doctor.Finding("disk", "1", problem=problem)], groups)
