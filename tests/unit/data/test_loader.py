"""PackLoader: the same packs for any number of ranks, exact resuming, errors and a clean end of its thread."""

import gc
import json
import subprocess
import sys
import threading
import time
from itertools import islice

import pytest
import torch

from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import Corpus
from megacogvx.data.faults import Fault
from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.loader import PackLoader
from megacogvx.data.planner import PackPlan
from megacogvx.errors import ConfigError, DataError
from megacogvx.testing.tiny_dataset import tiny_encoder, write_tiny_dataset

PATCH = (1, 2, 2)


@pytest.fixture
def folder(tmp_path):
    write_tiny_dataset(tmp_path, 30)
    return tmp_path


SETTINGS = ("on_bad_sample", "read_timeout", "access")


def loader(folder, rank=0, size=1, *, seed=0, packs=4, **values):
    settings = {name: values.pop(name) for name in SETTINGS if name in values}
    config = DataConfig(paths=(str(folder),), tokens_per_pack=64, packs_per_step=packs, **settings)
    corpus = Corpus(config)
    return PackLoader(corpus, PackPlan(corpus.columns, config, seed, PATCH), rank, size, **values)


def ids(packs):
    return [(pack.step, pack.place, pack.sample_ids) for pack in packs]


def take(steps, *args, **values):
    with loader(*args, **values) as packs:
        return [ids(step) for step in islice(packs, steps)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "pack-loader"]


def test_steps_and_places_in_order(folder):
    steps = take(5, folder)
    assert [[(step, place) for step, place, _ in packs] for packs in steps] == [
        [(step, place) for place in range(4)] for step in range(5)
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_same_plan(folder, size):
    whole = take(4, folder)
    parts = [take(4, folder, rank, size) for rank in range(size)]
    for step in range(4):
        assert [place for _, place, _ in parts[1][step]] == list(range(1, 4, size))
        assert sorted(pack for part in parts for pack in part[step]) == whole[step]


def test_resuming_repeats_and_loses_nothing(folder):
    whole = take(12, folder)
    with loader(folder, prefetch=3) as packs:
        seen = [ids(step) for step in islice(packs, 5)]
        while not packs._queue.full():  # let the thread read further
            time.sleep(0.01)
        state = json.loads(json.dumps(packs.state()))
        assert packs.next_step == 5
    seen += take(7, folder, state=state, start_step=5)
    assert seen == whole
    assert take(7, folder, start_step=5) == whole[5:]  # without a state: planned anew, the same


def test_resuming_on_other_ranks(folder):
    whole = take(9, folder)
    with loader(folder, 1, 2) as packs:
        list(islice(packs, 4))
        state = packs.state()
    parts = [take(5, folder, rank, 4, state=state) for rank in range(4)]
    assert [sorted(pack for part in parts for pack in part[step]) for step in range(5)] == whole[4:]


def test_state_of_another_step(folder):
    with loader(folder) as packs:
        next(packs)
        state = packs.state()
    with pytest.raises(DataError, match="is of step 1, the run goes on at 3"):
        loader(folder, state=state, start_step=3)


def test_packs_divide_by_ranks(folder):
    with pytest.raises(ConfigError, match=r"packs_per_step=4 doesn't divide by 3 .* 3, 6"):
        loader(folder, 0, 3)
    assert not threads()


def damage(folder):
    path = folder / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[64 + 64] ^= 1  # the first sample's first latent frame
    path.write_bytes(bytes(data))


def test_damaged_sample_keeps_its_place(folder, caplog):
    whole = take(8, folder)
    damage(folder)
    with loader(folder) as packs:
        steps = list(islice(packs, 8))
    assert [ids(step) for step in steps] == whole
    faults = [(pack, place) for step in steps for pack in step for place in pack.faults]
    assert faults
    assert f"{folder / 'shard-00000.bin'}: sample 1000 (record 0): latent frame 0 is damaged" in caplog.text
    for pack, place in faults:
        assert pack.sample_ids[place] == 1000 and pack.faults[place] == Fault.DAMAGED
        clean = pack.without({place})
        assert not clean.latents[place].any() and not clean.text[place].any()
        assert [sample.carries_loss for sample in clean.layout.samples] == [
            m != place for m in range(clean.layout.num_samples)
        ]
        assert clean.layout.boundaries == pack.layout.boundaries
    assert all(1000 not in pack.sample_ids or pack.faults for step in steps for pack in step)


def test_damaged_sample_ends_the_run_where_that_is_asked(folder):
    damage(folder)
    with loader(folder, on_bad_sample="stop") as packs:
        with pytest.raises(DataError, match=r"shard-00000\.bin: sample 1000 "):
            list(islice(packs, 30))
        with pytest.raises(DataError, match="sample 1000 "):
            next(packs)
    assert not threads()


def test_stuck_read_is_given_up(folder, monkeypatch, caplog):
    free, sample = threading.Event(), Corpus.sample

    def stuck(self, index, *what):
        if index == 3:
            free.wait(60)
        return sample(self, index, *what)

    monkeypatch.setattr(Corpus, "sample", stuck)
    with loader(folder, read_timeout=0.1) as packs:
        steps = list(islice(packs, 4))
    free.set()
    faults = {pack.sample_ids[m]: fault for step in steps for pack in step for m, fault in pack.faults.items()}
    assert faults == {1003: Fault.STUCK}
    assert "shard-00000.bin: sample 1003 (record 3): the read is stuck for 0.1 seconds" in caplog.text


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_context_ranks_read_their_frames_only(folder, access):
    with loader(folder, access=access) as packs:
        whole = list(islice(packs, 3))
    read = 0
    for rank in range(4):
        with loader(folder, cut=((0, 1), (rank, 4)), access=access) as packs:
            for pack, full in zip(
                (p for step in islice(packs, 3) for p in step), (p for s in whole for p in s), strict=True
            ):
                assert pack.layout == full.layout
                for piece in pack.layout.local((0, 1), (rank, 4)).video_slices:
                    grid = pack.layout.samples[piece.sample].grid
                    rows = grid[1] * grid[2]
                    frames = range(piece.start // rows, -(-piece.stop // rows))
                    expected = full.latents[piece.sample][frames.start : frames.stop]
                    assert torch.equal(pack.frames(piece.sample, frames), expected)
                read += sum(latents.numel() for latents in pack.latents)
    everything = sum(latents.numel() for step in whole for pack in step for latents in pack.latents)
    assert everything <= read < 2 * everything  # a frame on the border of two ranks is read by both


def test_close_ends_the_thread_and_the_iteration(folder):
    packs = loader(folder, prefetch=1)
    next(packs)
    packs.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(packs)
    packs.close()


def test_dropped_loader_ends_its_thread(folder):
    packs = loader(folder, prefetch=1)
    next(packs)
    (thread,) = threads()
    del packs
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_tensors_outlive_the_loader(folder):
    with loader(folder) as packs:
        (first, *_) = next(packs)
    gc.collect()
    assert all(torch.isfinite(latents).all() for latents in first.latents)


BUSY = """
import sys, time, torch
from megacogvx.data import loader
from megacogvx.data.corpus import Corpus
from megacogvx.data.config import DataConfig
from megacogvx.data.planner import PackPlan

def load_step(*_):
    end = time.monotonic() + 2
    while time.monotonic() < end:
        torch.randn(300_000).sum()

loader._load_step = load_step
config = DataConfig(paths=(sys.argv[1],), tokens_per_pack=64, packs_per_step=4)
corpus = Corpus(config)
packs = loader.PackLoader(corpus, PackPlan(corpus.columns, config, 0, (1, 2, 2)), 0, 1)
time.sleep(0.5)
"""


def test_a_process_ends_cleanly_while_the_thread_is_inside_torch(folder):
    done = subprocess.run([sys.executable, "-c", BUSY, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr  # -6, SIGABRT, if the interpreter goes down under the thread


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_packs_lie_in_the_callers_memory(folder, access):
    with loader(folder) as packs:
        expected = [pack for step in islice(packs, 2) for pack in step]
    given = []

    def allocate(size):
        given.append(torch.zeros(size, dtype=torch.uint8))
        return given[-1]

    with loader(folder, access=access, allocate=allocate) as packs:
        found = [pack for step in islice(packs, 2) for pack in step]
    homes = {memory.untyped_storage().data_ptr() for memory in given}
    for pack, plain in zip(found, expected, strict=True):
        for tensor, other in zip([*pack.latents, *pack.text], [*plain.latents, *plain.text], strict=True):
            assert torch.equal(tensor, other) and tensor.untyped_storage().data_ptr() in homes


def test_a_sample_with_foreign_token_ids_keeps_its_place(tmp_path):
    """Where it is read, not inside a step, which one rank alone would leave."""
    write_tiny_dataset(tmp_path, 30, encoder=tiny_encoder("token_ids"))
    texts = {record.sample_id: record.text for record in map(IndexedDataset(tmp_path).sample, range(30))}
    vocabulary = int(max(text.max() for text in texts.values()))
    foreign = {sample_id for sample_id, text in texts.items() if text.max() >= vocabulary}
    assert 0 < len(foreign) < 30
    with loader(tmp_path, vocabulary=vocabulary) as packs:
        for pack in (pack for step in islice(packs, 8) for pack in step):
            assert {pack.sample_ids[m] for m in pack.faults} == foreign & set(pack.sample_ids)
            assert set(pack.faults.values()) <= {Fault.DAMAGED}
    with loader(tmp_path, vocabulary=vocabulary + 1) as packs:
        assert not any(pack.faults for step in islice(packs, 8) for pack in step)
    with loader(tmp_path, vocabulary=vocabulary, on_bad_sample="stop") as packs:
        with pytest.raises(
            DataError, match=rf"sample \d+ \(record \d+\) has token ids 0 to {vocabulary}, the text encoder knows 0 to"
        ):
            list(islice(packs, 8))
