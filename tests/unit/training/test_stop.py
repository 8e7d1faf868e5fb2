"""A signal is remembered, once, and every rank hears of it."""

from __future__ import annotations

import os
import signal

import pytest

from megacogvx.training import stop
from megacogvx.training.stop import SIGNALS, StopSignal


@pytest.fixture
def installed():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopSignal().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_does_not_end_the_process(installed, number, monkeypatch):
    monkeypatch.setattr(stop, "any_rank", lambda condition, groups: condition)
    assert not installed.agreed(None)
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert installed.received == signal.Signals(number).name and installed.agreed(None)


def test_a_signal_to_another_rank_counts(installed, monkeypatch):
    monkeypatch.setattr(stop, "any_rank", lambda condition, groups: True)
    assert installed.agreed(None) and installed.received is None
