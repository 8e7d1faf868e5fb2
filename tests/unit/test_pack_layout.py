"""The ranks' cuts are a partition of the pack."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacogvx.errors import ConfigError, DataError
from megacogvx.pack_layout import (
    PADDING_ID,
    PackLayout,
    PackSample,
    RowSlice,
    build_layout,
    padded_length,
    place_sample,
    tokens_of,
)
from megacogvx.patches import grid_of

PATCHES = st.tuples(st.integers(1, 3), st.integers(1, 2)).map(lambda qp: (qp[0], qp[1], qp[1]))
TEXT_LENGTH, PATCH = 3, (2, 2, 2)


@st.composite
def layouts(draw, multiple: int = 1):
    """A pack of one to five samples, padded to a multiple."""
    patch = draw(PATCHES)
    samples = [
        place_sample(
            sample_id,
            frames=draw(st.integers(1, 5)),
            height=patch[1] * draw(st.integers(1, 3)),
            width=patch[2] * draw(st.integers(1, 3)),
            text_length=draw(st.integers(0, 4)),
            patch=patch,
        )
        for sample_id in range(draw(st.integers(1, 5)))
    ]
    return build_layout(samples, patch, multiple=multiple)


def two_samples() -> PackLayout:
    """3 text + 2 x 1 x 2 video tokens (one repeated frame), then 3 text + 1 x 2 x 2, then 2 of padding."""
    samples = [place_sample(11, 3, 2, 4, TEXT_LENGTH, PATCH), place_sample(12, 2, 4, 4, TEXT_LENGTH, PATCH)]
    return build_layout(samples, PATCH, num_tokens=16)


# -------------------------------------------------------------------------------------------------- counts


def test_tokens_of_the_published_sizes():
    # CogVideoX-5B: 49 frames of 480 x 720 are latents of 13 x 60 x 90; CogVideoX1.5: 81 of 768 x 1360, 21 x 96 x 170
    assert tokens_of(13, 60, 90, 226, (1, 2, 2)) == 226 + 13 * 30 * 45
    assert tokens_of(21, 96, 170, 224, (2, 2, 2)) == 224 + 11 * 48 * 85


@pytest.mark.parametrize("size", [(1, 3, 4), (1, 4, 3), (0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_latents_that_do_not_fit_the_patch_are_refused_with_a_size_that_does(size):
    with pytest.raises(
        DataError, match=r"don't fit the patch \(1, 2, 2\); the nearest size that does: 1 x [24] x [24]$"
    ):
        grid_of(*size, (1, 2, 2))


@given(st.integers(0, 1000), st.integers(1, 16))
def test_padded_length_is_the_next_multiple(tokens, multiple):
    assert padded_length(tokens, multiple) == min(n for n in range(tokens, tokens + multiple) if n % multiple == 0)


# -------------------------------------------------------------------------------------------------- layout


def test_the_padding_is_the_last_sample():
    layout = two_samples()
    assert layout.samples[-1] == PackSample(PADDING_ID, 2, (0, 0, 0))
    assert layout.num_samples == 3
    assert layout.boundaries == (0, 7, 14, 16)
    assert (layout.used_tokens, layout.num_tokens) == (14, 16)


def test_a_full_pack_has_a_padding_of_no_tokens():
    layout = build_layout([place_sample(1, 1, 2, 2, 3, (1, 2, 2))], (1, 2, 2))
    assert layout.boundaries == (0, 4, 4)
    assert layout.num_samples == 2


def test_the_sample_table_and_the_rotary_grid_list_every_sample():
    layout = two_samples()
    assert layout.sample_table().tolist() == [[0, 3, 2, 1, 2], [7, 3, 1, 2, 2], [14, 2, 0, 0, 0]]
    assert layout.sample_table().dtype == torch.int32
    moved = PackSample(5, 0, (1, 1, 1), origin=(0.0, 1.5, 2.0), step=(1.0, 0.5, 0.25))
    assert build_layout([moved], PATCH).rope_grid()[0].tolist() == [0.0, 1.5, 2.0, 1.0, 0.5, 0.25]


def test_tables_are_made_once_for_each_device():
    layout = two_samples()
    assert layout.sample_table() is layout.sample_table("cpu")
    assert layout.local((0, 2), (1, 2)) is layout.local((0, 2), (1, 2))
    assert layout.local((0, 2), (1, 2)) is not layout.local((1, 2), (0, 2))


def test_packs_that_cannot_be_are_refused():
    samples = [place_sample(1, 1, 2, 2, 3, (1, 2, 2))]
    with pytest.raises(DataError, match="at least one sample"):
        build_layout([], (1, 2, 2))
    with pytest.raises(DataError, match="1 samples hold 4 tokens, more than the pack's 3"):
        build_layout(samples, (1, 2, 2), num_tokens=3)
    with pytest.raises(ConfigError, match=r"10 tokens doesn't divide by 4 ranks; sizes that work: 8, 12"):
        build_layout(samples, (1, 2, 2), num_tokens=10, multiple=4)


# ---------------------------------------------------------------------------------------------------- cuts


def test_the_cut_of_one_rank_by_hand():
    # tokens of two_samples(): t t t v v v v | t t t v v v v | p p; the second of two ranks holds the last eight
    local = two_samples().local(tensor=(0, 1), context=(1, 2))
    assert local.tokens == local.context_tokens == range(8, 16)
    assert local.text_slices == (RowSlice(1, 1, 3), RowSlice(2, 0, 2))
    assert local.video_slices == (RowSlice(1, 0, 4),)
    assert local.text_index.tolist() == [0, 1, 6, 7]
    assert local.video_index.tolist() == [2, 3, 4, 5]
    assert local.modulation_rows.tolist() == [3, 3, 2, 2, 2, 2, 5, 5]


def test_repeated_frames_are_told_for_the_rows_of_the_first_frame_only():
    whole = two_samples().local()
    assert whole.repeated.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]  # of the first sample, two rows a frame
    tail = two_samples().local(context=(1, 4))  # tokens 4..8: the last three video rows of the first sample
    assert tail.video_slices == (RowSlice(0, 1, 4),)
    assert tail.repeated.tolist() == [1, 0, 0]


def test_context_ranks_are_outer_and_tensor_ranks_inner():
    layout = two_samples()
    starts = [layout.local((t, 2), (c, 2)).tokens.start for c in range(2) for t in range(2)]
    assert starts == [0, 4, 8, 12]
    assert layout.local((1, 2), (1, 2)).context_tokens == range(8, 16)


def test_a_pack_that_does_not_divide_is_refused_with_a_length_that_does():
    with pytest.raises(ConfigError, match=r"16 tokens cannot be cut over 3 tensor x 1 context ranks; pad it to 18"):
        two_samples().local((0, 3))


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_the_cuts_of_all_ranks_partition_the_pack(tensor, context, data):
    layout = data.draw(layouts(multiple=tensor * context))
    ranks = [layout.local((t, tensor), (c, context)) for c in range(context) for t in range(tensor)]
    assert [place for rank in ranks for place in rank.tokens] == list(range(layout.num_tokens))
    for kind in ("video_slices", "text_slices"):
        assert joined([rows for rank in ranks for rows in getattr(rank, kind)]) == whole_samples(layout, kind)


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_what_a_rank_knows_of_its_tokens_is_a_cut_of_what_one_rank_knows(tensor, context, data):
    layout = data.draw(layouts(multiple=tensor * context))
    whole = layout.local()
    ranks = [layout.local((t, tensor), (c, context)) for c in range(context) for t in range(tensor)]
    assert torch.equal(torch.cat([rank.modulation_rows for rank in ranks]), whole.modulation_rows)
    assert torch.equal(torch.cat([rank.repeated for rank in ranks]), whole.repeated)
    for kind in ("video_index", "text_index"):
        assert torch.equal(torch.cat([getattr(rank, kind) + rank.tokens.start for rank in ranks]), getattr(whole, kind))
    for rank in ranks:
        assert torch.equal(torch.cat([rank.video_index, rank.text_index])[rank.order], torch.arange(len(rank.tokens)))


@given(layouts())
def test_modulation_rows_name_the_sample_and_whether_a_token_is_text(layout):
    rows = layout.local().modulation_rows.tolist()
    for m, (sample, (start, stop)) in enumerate(zip(layout.samples, pairwise(layout.boundaries), strict=True)):
        assert rows[start:stop] == [2 * m + 1] * sample.text_length + [2 * m] * sample.video_length


def joined(slices: list[RowSlice]) -> list[RowSlice]:
    """Join consecutive slices of the same sample; anything that overlaps or leaves a hole stays apart."""
    result: list[RowSlice] = []
    for rows in slices:
        if result and (result[-1].sample, result[-1].stop) == (rows.sample, rows.start):
            rows = RowSlice(rows.sample, result.pop().start, rows.stop)
        result.append(rows)
    return result


def whole_samples(layout: PackLayout, kind: str) -> list[RowSlice]:
    """Return one slice for each sample that has tokens of this kind."""
    lengths = [s.video_length if kind == "video_slices" else s.text_length for s in layout.samples]
    return [RowSlice(m, 0, length) for m, length in enumerate(lengths) if length]
