import numpy as np
import pytest

from megacogvx.data.indexed.source import FileSource, MappedSource, merged


def test_near_spans_are_read_as_one():
    assert merged([(500, 10), (0, 100), (110, 10), (5, 0)], 10) == [(0, 120), (500, 10)]
    assert merged([(0, 100), (20, 10)], 0) == [(0, 100)]
    assert merged([(0, 100), (100, 10)], 0) == [(0, 110)]
    assert merged([(0, 0)], 10) == []


@pytest.mark.parametrize("gap", [(0, 100), (0, 30_000)])
def test_gathered_spans_hold_the_bytes_of_the_file(tmp_path, gap):
    data = np.random.default_rng(0).integers(0, 255, 60_000, dtype=np.uint8)
    (tmp_path / "x").write_bytes(data.tobytes())
    spans = [(start, 77) for start in gap]
    for source in (FileSource(tmp_path / "x"), MappedSource(tmp_path / "x", len(data))):
        held = source.gathered(spans)
        for start, length in spans:
            out = np.empty(length, np.uint8)
            held.copy(start, out)
            assert np.array_equal(out, data[start : start + length])
            assert np.array_equal(held.view(start, length), out)
        assert len(held.view(123, 0)) == 0
