"""Who holds which frames; what the ranks exchange is in tests/parallel."""

import itertools

import pytest

from megacogvx.parallel.frame_parallel import FrameShard, cut_latents, shard_latents, shard_pixels, split_problem


class Group:
    """As much of a process group as the cut asks for."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_frame_has_one_owner_at_every_resolution(ratio, ranks):
    for latents in range(ranks, 14):
        frames, levels = (latents - 1) * ratio + 1, ratio.bit_length() - 1
        shards = [shard_pixels(frames, ratio, Group(rank, ranks)) for rank in range(ranks)]
        for level in range(levels + 1):
            bounds = [(shard.start, shard.stop) for shard in (s.halved(level) for s in shards)]
            assert bounds[0][0] == 0 and bounds[-1][1] == (latents - 1) * ratio // 2**level + 1
            assert all(a[1] == b[0] and b[0] < b[1] for a, b in itertools.pairwise(bounds))
        assert [s.halved(levels).count for s in shards] == [len(run) for run in cut_latents(latents, ranks)]
        assert sum(shard.share for shard in shards) == pytest.approx(1.0)
        if latents % 2:
            halved = [shard.halved() for shard in shards] if ratio > 1 else []
            assert all(half.doubled() == shard for half, shard in zip(halved, shards, strict=False) if half.total % 2)


def test_an_even_count_of_latents_doubles_without_a_single_first_frame():
    first, second = (shard_latents(4, Group(rank, 2)) for rank in range(2))
    assert (first.doubled().start, first.doubled().stop) == (0, 4)
    assert (second.doubled().start, second.doubled().stop, second.doubled().total) == (4, 8, 8)


def test_the_latents_that_are_left_over_go_to_the_first_ranks():
    assert [len(run) for run in cut_latents(13, 4)] == [4, 3, 3, 3]
    assert [shard_pixels(49, 4, Group(rank, 4)).count for rank in range(4)] == [13, 12, 12, 12]


def test_a_cut_pair_is_found():
    with pytest.raises(AssertionError, match="a pair of frames is cut"):
        FrameShard(0, 4, 9).halved()


@pytest.mark.parametrize(
    ("frames", "ranks", "period", "nearest", "most"),
    [(16, 2, None, 17, 4), (9, 4, None, 13, 3), (13, 2, 8, 17, 3), (1, 2, None, 5, 1), (11, 1, None, 13, 3)],
)
def test_a_split_that_fails_names_what_works(frames, ranks, period, nearest, most):
    problem = split_problem(frames, ranks, 4, period)
    assert f"frames that works: {nearest};" in problem and problem.endswith(f": {most}")
    assert not split_problem(nearest, ranks, 4, period)
    whole = (frames - 1) // (period or 4) * (period or 4) + 1
    assert not split_problem(whole, most, 4, period)
    assert split_problem(whole, most + 1, 4, period)
