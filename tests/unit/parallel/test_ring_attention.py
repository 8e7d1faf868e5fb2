"""Which tokens the ranks of a ring exchange; the attention itself is held to one process in tests/parallel."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megacogvx.parallel.ring_attention import shared_rows

lengths = st.lists(st.integers(0, 12), min_size=1, max_size=6)


@given(lengths=lengths, ranks=st.integers(2, 5), padding=st.integers(0, 5))
def test_a_rank_lends_the_keys_that_the_other_attends_to_and_no_others(lengths, ranks, padding):
    boundaries = [sum(lengths[:place]) for place in range(len(lengths) + 1)]
    share = -(-(boundaries[-1] + padding) // ranks) or 1
    sample_of = {token: place for place, (a, b) in enumerate(pairwise(boundaries)) for token in range(a, b)}
    for owner in range(ranks):
        for reader in set(range(ranks)) - {owner}:
            read = {sample_of[token] for token in range(reader * share, (reader + 1) * share) if token in sample_of}
            owned = range(owner * share, (owner + 1) * share)
            wanted = [token - owner * share for token in owned if sample_of.get(token) in read]
            assert list(shared_rows(boundaries, share, owner, reader)) == wanted


def test_the_example_of_a_long_pack():
    """Eight samples of 85,906 tokens over a ring of four: every boundary between ranks is one between samples."""
    boundaries, share = [place * 85_906 for place in range(9)], 2 * 85_906
    assert all(not shared_rows(boundaries, share, owner, owner + 1) for owner in range(3))
    assert list(shared_rows([0, 10, 30], 15, 1, 0)) == list(range(15))
    assert list(shared_rows([0, 10, 30], 15, 0, 1)) == list(range(10, 15))
