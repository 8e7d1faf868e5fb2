import pytest
import torch

from megacogvx.models.vae.frames import FrameSpan, HaloStream, chunks


@pytest.mark.parametrize(
    ("total", "size", "lengths"),
    [(49, 8, [9, 8, 8, 8, 8, 8]), (13, 2, [3, 2, 2, 2, 2, 2]), (7, 8, [7]), (8, 8, [8]), (22, 8, [14, 8]), (1, 2, [1])],
)
def test_the_remainder_goes_into_the_first_chunk(total, size, lengths):
    parts = chunks(total, size)
    assert [len(part) for part in parts] == lengths
    assert [frame for part in parts for frame in part] == list(range(total))


@pytest.mark.parametrize(("total", "halved", "doubled"), [(1, 1, 1), (2, 1, 4), (3, 2, 5), (8, 4, 16), (9, 5, 17)])
def test_spans(total, halved, doubled):
    span = FrameSpan.whole(total)
    assert (span.halved().total, span.doubled().total, span.first_alone) == (halved, doubled, total % 2 == 1)


def test_halos_come_back_in_the_order_of_the_calls_and_own_their_memory():
    inputs = [torch.full((1, 1, 6, 2, 2), float(i)) for i in range(3)]
    first = HaloStream([])
    for padded in inputs:
        assert first.previous() is None
        first.keep(padded, 2)
    assert len(first.after) == 3
    for halo in first.after:
        assert halo.shape == (1, 1, 2, 2, 2)
        assert halo.untyped_storage().nbytes() == halo.numel() * halo.element_size(), "not a view of the whole input"
    second = HaloStream(first.after)
    for number, padded in enumerate(inputs):
        assert float(second.previous().mean()) == number
        second.keep(padded, 2)
    with pytest.raises(AssertionError, match="more convolutions than the 3"):
        second.previous()
