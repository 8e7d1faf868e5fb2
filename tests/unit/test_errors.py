"""One base for what a user can get wrong, so that the command line can tell it from a broken promise of ours."""

import inspect

import pytest

from megacogvx import errors

TYPED = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not errors.MegacogvxError]


def test_the_kinds_are_there():
    names = {"ConfigError", "DataError", "AgreedError", "CheckpointError", "LaunchError", "EndpointError"}
    assert {kind.__name__ for kind in TYPED} == names


@pytest.mark.parametrize("kind", TYPED)
def test_each_is_a_megacogvx_error_and_nothing_else(kind):
    assert kind.__bases__ == (errors.DataError if kind is errors.AgreedError else errors.MegacogvxError,)
    assert not issubclass(kind, ValueError | OSError | RuntimeError | AssertionError)
    assert str(kind("model.num_layers=0: must be at least 1")) == "model.num_layers=0: must be at least 1"
