from __future__ import annotations

import pytest

from megacogvx.errors import AgreedError, DataError
from megacogvx.training import agreement
from megacogvx.training.agreement import agreed, read_together


@pytest.fixture
def peers(monkeypatch):
    """Two ranks, of which the test is rank 0; what is put in here happens to the other."""
    other: list[str] = []
    monkeypatch.setattr(agreement, "any_rank", lambda mine, groups: mine or bool(other))
    monkeypatch.setattr(agreement, "gather_json", lambda mine, groups: [mine, (other[0] if other else None, False)])
    return other


def test_an_error_of_one_rank_is_raised_on_all(peers):
    with agreed(None, "saying hello"):
        pass
    with (
        pytest.raises(AgreedError, match="saying hello failed: rank 0: OSError: disk full"),
        agreed(None, "saying hello"),
    ):
        raise OSError("disk full")
    peers.append("OSError: disk full")
    with pytest.raises(AgreedError, match=r"saying hello failed: rank 1: OSError: disk full$"):
        with agreed(None, "saying hello"):
            pass


@pytest.mark.parametrize(("error", "status"), [(OSError("stale handle"), 1), (DataError("sample 3"), 2)])
def test_only_a_users_error_keeps_a_launcher_from_starting_again(peers, error, status):
    peers.append("OSError: stale handle")
    with pytest.raises(AgreedError) as raised, agreed(None, "reading"):
        raise error
    assert raised.value.exit_status == status


def test_our_own_mistakes_keep_their_traceback(peers, monkeypatch):
    told = []
    monkeypatch.setattr(agreement.logger, "exception", lambda *words: told.append(words))
    for error, count in ((DataError("sample 3"), 0), (AssertionError("3 != 4"), 1)):
        with pytest.raises(AgreedError), agreed(None, "reading"):
            raise error
        assert len(told) == count


def test_a_loader_that_fails_on_another_rank_ends_this_one_too(peers):
    def items():
        yield 1
        yield 2
        raise DataError("sample 3 can't be read")

    read = read_together(items(), None)
    assert [next(read)[0], next(read)[0]] == [1, 2]
    with pytest.raises(AgreedError, match="rank 0: DataError: sample 3"):
        next(read)
    read = read_together(items(), None)
    assert next(read)[0] == 1
    peers.append("DataError: sample 4 can't be read")
    with pytest.raises(AgreedError, match="rank 1: DataError: sample 4"):
        next(read)


def test_a_rank_counts_the_wait_for_its_own_loader_alone(peers, monkeypatch):
    """So that a slow disk is found: in the exchange that follows, every rank waits for the slowest."""
    now = [0.0]

    def items():
        now[0] += 0.25
        yield "packs"

    def slow_peer(mine, groups):
        now[0] += 9.0
        return mine

    monkeypatch.setattr(agreement, "any_rank", slow_peer)
    assert next(read_together(items(), None, lambda: now[0])) == ("packs", 0.25)
