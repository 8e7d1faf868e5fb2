from __future__ import annotations

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from megacogvx.parallel.sharded_optimizer import boxes

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_are_the_range_in_order_and_few(shape, data):
    """Flattened one after the other, the boxes of a range are the range."""
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    whole = torch.arange(prod(shape)).view(shape)
    found = list(boxes(start, stop, shape))
    parts = [whole[tuple(slice(at, at + size) for at, size in zip(offset, box, strict=True))] for offset, box in found]
    assert [number for part in parts for number in part.reshape(-1).tolist()] == list(range(start, stop))
    assert [tuple(part.shape) for part in parts] == [box for _, box in found]
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(SHAPES, st.data())
def test_the_pieces_of_two_neighbours_never_begin_at_the_same_place(shape, data):
    """A box is known by its offset: those of all data ranks differ."""
    cut = data.draw(st.integers(0, prod(shape)))
    offsets = [offset for start, stop in ((0, cut), (cut, prod(shape))) for offset, _ in boxes(start, stop, shape)]
    assert len(offsets) == len(set(offsets))
