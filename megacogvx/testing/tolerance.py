"""Comparison of tensors by relative error: the one definition that every test and every stated bound uses.

Two tensors are equal within `bound` when ||a - b|| / ||b|| <= bound and max|a - b| <= 10 * bound * max|b|, b being
the reference. The first is what a bound is about; the second finds a few badly wrong elements that the norm of a large
tensor would hide. Errors are computed in fp64, per tensor and never over a concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

NEGLIGIBLE_NORM = 1e-7  # of the largest reference norm in a set of tensors: below it, rounding alone decides the ratio
MAXIMUM_FACTOR = 10.0  # how much further than the norm the worst single element may be off


@dataclass(frozen=True)
class TensorError:
    """How far one tensor is from its reference, both numbers without a unit.

    Attributes:
        norm: ||a - b|| / ||b||.
        maximum: max|a - b| / max|b|.
        place: index of the element that differs most.
    """

    norm: float
    maximum: float
    place: tuple[int, ...]

    def within(self, bound: float) -> bool:
        """Tell whether both numbers keep `bound`; NaN and infinity never do."""
        return self.norm <= bound and self.maximum <= MAXIMUM_FACTOR * bound


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||actual - expected|| / ||expected||: 0 for equal tensors, infinity where only the reference is zero.

    Args:
        actual: the tensor under test, any shape, dtype and device.
        expected: the reference, of the same shape.
    """
    return _measure(actual, expected).norm


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float, name: str = "") -> None:
    """Fail unless ||a - b|| / ||b|| <= bound and max|a - b| <= 10 * bound * max|b|.

    Args:
        actual: the tensor under test.
        expected: the reference, of the same shape; dtype and device may differ.
        bound: largest relative error; 0 asks for equal values.
        name: what is compared, for the message.

    Raises:
        AssertionError: the shapes differ, a value is NaN or infinite, or a bound is broken; the message names the
            errors, the worst element and both of its values.
    """
    label = name or "tensor"
    assert actual.shape == expected.shape, f"{label}: shape {_shape(actual)}, expected {_shape(expected)}"
    for kind, tensor in (("actual", actual), ("expected", expected)):
        bad = int((~torch.isfinite(tensor)).sum())
        assert not bad, f"{label}: {bad} of {tensor.numel()} {kind} values are NaN or infinite"
    error = _measure(actual, expected)
    assert error.within(bound), _explain(label, error, bound, actual, expected)


def assert_all_close(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], bound: float
) -> list[str]:
    """Compare two sets of named tensors, e.g. all gradients of a model, each on its own.

    A tensor whose reference norm is under 1e-7 of the largest (a gradient that is zero but for rounding) has no
    meaningful relative error: it is compared absolutely, with `bound` times the largest reference norm.

    Args:
        actual: the tensors under test.
        expected: the references, under the same names.
        bound: largest relative error.

    Returns:
        The names that were compared absolutely.

    Raises:
        AssertionError: the names differ, or at least one tensor is off; every such tensor is listed.
    """
    missing, unknown = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    assert not missing and not unknown, f"names differ: missing {missing}, without a reference {unknown}"
    norms = {name: _norm(tensor) for name, tensor in expected.items()}
    largest = max(norms.values(), default=0.0)
    negligible, failures = [], []
    for name, reference in expected.items():
        try:
            if norms[name] < NEGLIGIBLE_NORM * largest:
                negligible.append(name)
                _assert_small_difference(actual[name], reference, bound * largest, name)
            else:
                assert_close(actual[name], reference, bound, name)
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, f"{len(failures)} of {len(expected)} tensors are off:\n  " + "\n  ".join(failures)
    return negligible


def _assert_small_difference(actual: torch.Tensor, expected: torch.Tensor, limit: float, name: str) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {_shape(actual)}, expected {_shape(expected)}"
    difference = _norm(actual.double().cpu() - expected.double().cpu())
    assert difference <= limit, f"{name}: the norm of the difference is {difference:.3g}, over {limit:.3g} (absolute)"


def _measure(actual: torch.Tensor, expected: torch.Tensor) -> TensorError:
    assert actual.shape == expected.shape, f"shape {_shape(actual)}, expected {_shape(expected)}"
    if not actual.numel():
        return TensorError(0.0, 0.0, ())
    # Where both lie, so that a GPU's billions of values need not come to the host for one number.
    device = actual.device if actual.device == expected.device else torch.device("cpu")
    a, b = (tensor.detach().to(device, torch.float64) for tensor in (actual, expected))
    difference = (a - b).abs()
    place = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)) if a.dim() else ()
    return TensorError(
        norm=_ratio(_norm(difference), _norm(b)),
        maximum=_ratio(float(difference.max()), float(b.abs().max())),
        place=place,
    )


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach().double()))


def _ratio(difference: float, reference: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / reference if reference else math.inf


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _explain(label: str, error: TensorError, bound: float, actual: torch.Tensor, expected: torch.Tensor) -> str:
    return (
        f"{label}: relative error {error.norm:.3g}, largest difference {error.maximum:.3g} of the largest value; "
        f"bounds {bound:.3g} and {MAXIMUM_FACTOR * bound:.3g}; worst at {list(error.place)}: "
        f"{actual[error.place].item():.9g}, expected {expected[error.place].item():.9g}; shape {_shape(expected)}"
    )
