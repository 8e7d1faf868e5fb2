"""A sample that one rank can't read keeps its place as zeros without loss on every rank."""

from __future__ import annotations

import pytest

from megacogvx.testing.spawn import on_ranks

CP2 = {"context_parallel_size": 2}
BAD = 1004  # its damage is on the second rank's copy of the dataset alone


def _damage(folder, sample_id):
    from megacogvx.data.indexed import IndexedDataset

    columns = IndexedDataset(folder).shards[0].index.columns
    row = columns["sample_id"].tolist().index(sample_id)
    frame = 4 * 4 * 8 * 2
    data = bytearray((folder / "shard-00000.bin").read_bytes())
    for number in range(4):
        data[int(columns["record"][row]) + 64 + number * frame] ^= 1
    (folder / "shard-00000.bin").write_bytes(data)


@pytest.mark.slow
@on_ranks(2, {}, CP2)
def test_what_one_rank_cannot_read_is_zeros_on_all(groups, folder):
    from megacogvx.data.config import DataConfig
    from megacogvx.data.corpus import Corpus
    from megacogvx.data.faults import FaultCounter
    from megacogvx.data.loader import PackLoader
    from megacogvx.data.planner import PackPlan
    from megacogvx.errors import AgreedError
    from megacogvx.testing.tiny_dataset import write_tiny_dataset
    from megacogvx.training.inputs import agree_on_faults

    mine = folder / f"rank{groups.rank}"
    write_tiny_dataset(mine, 12, sizes=((4, 4, 4),))
    if groups.rank == 1:
        _damage(mine, BAD)
    config = DataConfig(paths=(str(mine),), tokens_per_pack=96, packs_per_step=2, read_timeout=30.0)
    corpus = Corpus(config)
    plan = PackPlan(corpus.columns, config, seed=0, patch=(1, 2, 2))
    counter, tight, found = FaultCounter(limit=8), FaultCounter(limit=1), 0
    with PackLoader(corpus, plan, *groups.data, cut=(groups.tensor, groups.context)) as loader:
        for _ in range(6):
            packs = next(loader)
            bad = agree_on_faults(packs, loader.layouts, groups, counter)
            marked = {loader.layouts[place].samples[m].sample_id for place, members in enumerate(bad) for m in members}
            everywhere = [s.sample_id for layout in loader.layouts for s in layout.samples[:-1]]
            if not marked:  # not in this step, or the second rank holds none of its tokens
                assert not any(pack.faults for pack in packs)
                continue
            assert marked == {BAD} <= set(everywhere)
            found += 1
            for pack in packs:
                cleaned = pack.without(bad[pack.place])
                for m, sample in enumerate(cleaned.layout.samples[:-1]):
                    is_bad = m in bad[pack.place]
                    assert sample.carries_loss is not is_bad
                    for kept, read in ((cleaned.latents[m], pack.latents[m]), (cleaned.text[m], pack.text[m])):
                        assert kept.equal(read * 0 if is_bad else read)
            if groups.rank == 0:
                assert not any(pack.faults for pack in packs)  # this rank could read all of it
            with pytest.raises(AgreedError, match=f"the last one is {BAD}"):
                agree_on_faults(packs, loader.layouts, groups, tight)
    assert found and dict(counter.counts) == {"damaged": found}
