"""The writer beside the training: what it sees, how its end is known, and that its death is an error."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megacogvx.checkpoint.manifest import checksum
from megacogvx.checkpoint.writing import TensorWrite
from megacogvx.errors import CheckpointError

NAME = "__0_0.distcp"


def request(folder: Path, tensor: torch.Tensor, write=None):
    """Return what megatron-core plans for one rank: one file of one tensor."""

    def plain(rank, buckets, results):
        (folder / buckets[0][1]).write_bytes(bytes(buckets[0][2][1][0][1].tolist()))
        results.put({0: ["written"]})

    buckets, results = [(folder / NAME, NAME, ([], [("item", tensor)]))], queue.Queue()
    return SimpleNamespace(
        async_fn=write or plain, async_fn_args=(0, buckets, results), preload_fn=lambda: buckets,
        finalize_fns=[lambda: (folder / ".metadata").write_text(str(results.get_nowait()))],
    )  # fmt: skip


@pytest.mark.parametrize("background", [True, False])
def test_the_file_is_sealed_and_the_results_reach_megatron_core(tmp_path, background):
    write = TensorWrite(request(tmp_path, torch.tensor([1, 2, 3])), tmp_path, background=background)
    write.start()
    assert write.wait() == {NAME: {"size": 3, "xxh3": checksum(tmp_path / NAME)}}
    write.finish()
    assert (tmp_path / ".metadata").read_text() == "{0: ['written']}"


def test_what_changes_after_the_start_is_not_written(tmp_path):
    tensor, gate = torch.tensor([1, 2, 3]), threading.Event()

    def late(rank, buckets, results):
        gate.wait()
        (tmp_path / NAME).write_bytes(bytes(buckets[0][2][1][0][1].tolist()))
        results.put({})

    live = {tensor.untyped_storage().data_ptr()}
    write = TensorWrite(request(tmp_path, tensor, late), tmp_path, background=True, live=live)
    write.start()
    assert not write.is_done()
    tensor.fill_(9)
    gate.set()
    write.wait()
    assert (tmp_path / NAME).read_bytes() == b"\x01\x02\x03"


def test_what_is_a_copy_already_is_not_copied_again(tmp_path):
    copy, seen = torch.tensor([1, 2, 3]), []

    def look(rank, buckets, results):
        seen.append(buckets[0][2][1][0][1].data_ptr())
        (tmp_path / NAME).touch()
        results.put({})

    write = TensorWrite(request(tmp_path, copy, look), tmp_path, background=True, live={1})
    write.start()
    write.wait()
    assert seen == [copy.data_ptr()]


def fails(rank, buckets, results):
    raise OSError(28, "No space left on device")


def returns_an_error(rank, buckets, results):
    results.put(RuntimeError("No space left in a worker"))


@pytest.mark.parametrize("how", [fails, returns_an_error])
def test_a_writer_that_fails_is_an_error_of_the_save(tmp_path, how):
    write = TensorWrite(request(tmp_path, torch.ones(1), how), tmp_path, background=True)
    write.start()
    with pytest.raises(CheckpointError, match="No space"):
        write.wait()


def test_a_rank_without_tensors_has_nothing_to_wait_for(tmp_path):
    nothing = SimpleNamespace(async_fn=None, async_fn_args=(), preload_fn=None, finalize_fns=[lambda: None])
    write = TensorWrite(nothing, tmp_path, background=True)
    write.start()
    assert write.is_done() and write.wait() == {}
    write.finish()


def test_an_error_between_collectives_waits_for_their_end(tmp_path):
    """What rank 0 alone writes must not keep it from the broadcast that follows."""
    from megacogvx.checkpoint.writing import _keeping

    problems: list[Exception] = []
    write = TensorWrite(request(tmp_path, torch.tensor([1])), tmp_path, background=False, problems=problems)
    write.wait()
    write.finish()
    _keeping(fails, problems)(0, 0, 0)
    assert len(problems) == 1
    write._request.finalize_fns[0] = lambda: None
    with pytest.raises(CheckpointError, match="No space left"):
        write.finish()
