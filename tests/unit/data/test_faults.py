"""Bad samples: told apart, given up when stuck, counted, and too many in a row an error."""

import json
import threading

import pytest

from megacogvx.data.faults import Fault, FaultCounter, GuardedReader, SampleError
from megacogvx.errors import AgreedError, DataError


def fail(error):
    raise error


def test_results_and_errors_come_through():
    read = GuardedReader(30)
    assert read(lambda: 5, "x") == 5
    with pytest.raises(SampleError, match="checksum") as caught:
        read(lambda: fail(DataError("checksum differs")), "x")
    assert caught.value.fault == Fault.DAMAGED
    with pytest.raises(MemoryError):
        read(lambda: fail(MemoryError()), "x")
    read.close()


def test_a_stuck_read_is_given_up_and_the_next_one_works():
    free = threading.Event()
    read = GuardedReader(0.05)
    with pytest.raises(SampleError, match="sample 7: the read is stuck") as caught:
        read(free.wait, "sample 7")
    assert caught.value.fault == Fault.STUCK
    read.timeout = 30
    assert read(lambda: 6, "x") == 6
    read.close()
    free.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "sample-reader"]:
        thread.join(20)
        assert not thread.is_alive()


def test_counts_by_reason_and_stops_after_a_row():
    counter = FaultCounter(3)
    counter.add([1, 2, 0, 1, 1, 0], range(6))
    assert counter.counts == {"damaged": 3, "stuck": 1} and counter.in_a_row == 0
    counter.add([0, 2, 2], range(3))
    with pytest.raises(DataError, match=r"3 samples in a row .* 41 \(damaged\)"):
        counter.add([1, 1], [41, 42])


def test_a_resumed_run_counts_on():
    first = FaultCounter(3)
    first.add([0, 1, 2], [10, 11, 12])
    again = FaultCounter(3, json.loads(json.dumps(first.state())))
    again.add([0], [13])
    assert again.counts == {"damaged": 1, "stuck": 1}
    with pytest.raises(AgreedError, match="3 samples in a row"):
        FaultCounter(3, first.state()).add([1], [13])
