"""The comparison that all other tests lean on has to fail where it should."""

import math

import pytest
import torch

from megacogvx.testing.tolerance import assert_all_close, assert_close, relative_error

REFERENCE = torch.tensor([3.0, 4.0])  # norm 5


def test_relative_error_is_the_norm_of_the_difference_over_the_norm_of_the_reference():
    assert relative_error(REFERENCE + torch.tensor([0.3, 0.4]), REFERENCE) == pytest.approx(0.1, rel=1e-6)
    assert relative_error(REFERENCE, REFERENCE) == 0.0
    assert relative_error(REFERENCE, torch.zeros(2)) == math.inf
    assert relative_error(torch.zeros(2), REFERENCE) == 1.0


def test_relative_error_is_exact_in_low_precision():
    # 1 + 2^-7 is the next bf16 number after 1: sums in bf16 would lose it among 4096 equal elements
    actual = torch.ones(4096, dtype=torch.bfloat16)
    actual[0] += 2**-7
    assert relative_error(actual, torch.ones(4096)) == pytest.approx(2**-7 / 64, rel=1e-9)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)])
def test_equal_tensors_pass_with_a_bound_of_zero(shape):
    assert_close(torch.ones(shape), torch.ones(shape), bound=0.0)


def test_bounds_are_inclusive_and_dtypes_may_differ():
    assert_close(torch.tensor([1.5], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.float64), bound=0.5)


def test_norm_over_the_bound_fails():
    with pytest.raises(AssertionError, match=r"gate: relative error 0\.1.*bounds 0\.09 and 0\.9"):
        assert_close(REFERENCE * 1.1, REFERENCE, bound=0.09, name="gate")


def test_one_bad_element_fails_though_the_norm_passes():
    expected = torch.ones(100, 100)
    actual = expected.clone()
    actual[7, 9] += 0.5
    assert relative_error(actual, expected) == pytest.approx(0.005)
    with pytest.raises(AssertionError, match=r"worst at \[7, 9\]: 1\.5, expected 1"):
        assert_close(actual, expected, bound=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["actual", "expected"])
def test_values_that_are_not_finite_fail_on_either_side(value, side):
    tensors = {"actual": REFERENCE.clone(), "expected": REFERENCE.clone()}
    tensors[side][0] = value
    with pytest.raises(AssertionError, match=f"1 of 2 {side} values are NaN or infinite"):
        assert_close(**tensors, bound=1e9)


def test_shapes_that_only_broadcast_fail():
    with pytest.raises(AssertionError, match=r"gate: shape \[2\], expected \[1, 2\]"):
        assert_close(REFERENCE, REFERENCE[None], bound=1.0, name="gate")


def test_sets_are_compared_tensor_by_tensor():
    expected = {"large": torch.full((1000,), 10.0), "small": torch.tensor([1.0])}
    actual = {"large": expected["large"], "small": torch.tensor([1.01])}  # 3e-5 of the concatenation's norm
    with pytest.raises(AssertionError, match=r"1 of 2 tensors are off:\s+small: relative error 0\.01"):
        assert_all_close(actual, expected, bound=1e-3)


@pytest.mark.parametrize(
    ("names", "message"),
    [("a", r"missing \['b'\], without a reference \[\]"), ("abc", r"missing \[\], without a reference \['c'\]")],
)
def test_sets_need_the_same_names(names, message):
    with pytest.raises(AssertionError, match=message):
        assert_all_close(dict.fromkeys(names, REFERENCE), dict.fromkeys("ab", REFERENCE), bound=1.0)


def test_negligible_tensors_are_compared_absolutely_and_named():
    expected = {"weight": REFERENCE, "zero": torch.tensor([1e-9])}
    assert assert_all_close({"weight": REFERENCE, "zero": torch.tensor([-1e-9])}, expected, bound=1e-5) == ["zero"]
    with pytest.raises(AssertionError, match=r"zero: the norm of the difference is .* \(absolute\)"):
        assert_all_close({"weight": REFERENCE, "zero": torch.tensor([1e-3])}, expected, bound=1e-5)


def test_a_negligible_tensor_that_is_not_finite_fails():
    expected = {"weight": REFERENCE, "zero": torch.tensor([0.0])}
    with pytest.raises(AssertionError, match="zero"):
        assert_all_close({"weight": REFERENCE, "zero": torch.tensor([math.nan])}, expected, bound=1e-5)


def test_errors_are_computed_in_fp64_and_nothing_is_fetched_to_the_host(monkeypatch):
    """Of tensors on one device: a pack's outputs on a GPU are billions of values."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: pytest.fail("copied to the host"))
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(expected + 1e-10, expected) == pytest.approx(2**0.5 * 1e-10 / 5, rel=1e-4)
