"""A draw is a function of (seed, what, place) alone: not of the rank, the order or what was drawn before."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from megacogvx import draws

NUMBERS = st.integers(-(2**63), 2**64)


def test_keys_are_pinned():
    # a changed key would change every run that resumes
    assert draws.key(0, "noise") == 11440499399205189314
    assert draws.key(7, "noise", 100, 2**63 + 5) == 8642061825749547048
    assert draws.uniform(7, "timestep", 3, 11) == 0.698682002419001


@given(NUMBERS, st.lists(NUMBERS, max_size=4))
def test_keys_are_64_bit_and_take_numbers_modulo_2_to_the_64(seed, place):
    key = draws.key(seed, "noise", *place)
    assert 0 <= key < 2**64
    assert key == draws.key(seed + 2**64, "noise", *(number - 2**64 for number in place))


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b"]), st.integers(0, 3), st.integers(0, 3))))
def test_different_places_give_different_keys(places):
    keys = {draws.key(seed, what, *place) for seed, what, *place in places}
    assert len(keys) == len(set(places))


def test_how_many_numbers_say_where_matters():
    assert len({draws.key(1, "a"), draws.key(1, "a", 0), draws.key(1, "a", 0, 0)}) == 3


@given(NUMBERS, NUMBERS)
def test_uniform_stays_below_one(seed, place):
    assert 0.0 <= draws.uniform(seed, "timestep", place) < 1.0


def test_uniform_covers_the_interval_evenly():
    numbers = torch.tensor([draws.uniform(0, "timestep", step) for step in range(4096)])
    counts = torch.histc(numbers, bins=16, min=0.0, max=1.0)
    assert counts.min() > 190
    assert counts.max() < 330  # 256 expected, a standard deviation of 15.5


def test_normal_has_mean_zero_and_variance_one():
    noise = draws.normal((200, 200), 0, "noise", 1)
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.var()) - 1.0) < 0.03


def test_neighbouring_places_are_uncorrelated():
    first, second = draws.normal((10_000,), 0, "noise", 1), draws.normal((10_000,), 0, "noise", 2)
    assert abs(float((first * second).mean())) < 0.04


def test_a_draw_neither_reads_nor_moves_the_process_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draws.normal((4,), 5, "noise", 1)
    order = draws.permutation(10, 5, "order")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draws.normal((4,), 5, "noise", 1), first)
    assert draws.permutation(10, 5, "order") == order


@given(st.integers(0, 12), st.lists(st.integers(0, 12), max_size=4))
def test_frames_are_the_same_however_they_are_cut(total, cuts):
    edges = [0, *sorted(min(cut, total) for cut in cuts), total]
    parts = [draws.normal_frames(range(*pair), (2, 3), 9, "noise", 4, 17) for pair in pairwise(edges)]
    whole = draws.normal_frames(range(total), (2, 3), 9, "noise", 4, 17)
    assert whole.shape == (total, 2, 3)
    assert torch.equal(torch.cat(parts), whole)


def test_a_frame_is_the_draw_of_its_own_place():
    frames = draws.normal_frames(range(3, 5), (2, 3), 9, "noise", 4, 17)
    assert torch.equal(frames[1], draws.normal((2, 3), 9, "noise", 4, 17, 4))


@given(st.integers(0, 60), NUMBERS)
def test_a_permutation_holds_every_number_once(count, seed):
    assert sorted(draws.permutation(count, seed, "order", 1)) == list(range(count))


def test_permutations_differ_by_place():
    assert draws.permutation(50, 0, "order", 1) != draws.permutation(50, 0, "order", 2)
