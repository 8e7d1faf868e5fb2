"""Side columns: values of these samples in this order, replaced whole, and never read damaged."""

import numpy as np
import pytest

from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.indexed.side_columns import read_side_column, side_columns, write_side_column
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import write_tiny_dataset

IDS = np.arange(5, dtype=np.uint64) + 10


def test_the_newest_generation_counts(tmp_path):
    write_side_column(tmp_path, "flow", np.zeros(5), IDS)
    write_side_column(tmp_path, "flow", np.array([1, 2, np.nan, 4, 5.5]), IDS)
    write_side_column(tmp_path, "flow-2", np.ones(5), IDS)
    assert side_columns(tmp_path) == ["flow", "flow-2"]
    assert np.array_equal(read_side_column(tmp_path, "flow", IDS), [1, 2, np.nan, 4, 5.5], equal_nan=True)
    assert len(list((tmp_path / "columns").iterdir())) == 3


def test_dataset_reads_its_own(tmp_path):
    write_tiny_dataset(tmp_path, 6)
    dataset = IndexedDataset(tmp_path)
    write_side_column(tmp_path, "aesthetic", np.arange(6.0), dataset.sample_id)
    assert dataset.side_column("aesthetic").tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"no side column 'flow' \(it has: aesthetic\)"):
        dataset.side_column("flow")


def test_other_samples_are_refused(tmp_path):
    write_side_column(tmp_path, "flow", np.zeros(5), IDS)
    with pytest.raises(DataError, match="samples were added"):
        read_side_column(tmp_path, "flow", np.append(IDS, IDS[-1] + 1))
    with pytest.raises(DataError, match="other samples"):
        read_side_column(tmp_path, "flow", IDS[::-1])
    with pytest.raises(DataError, match="4 values for 5 samples"):
        write_side_column(tmp_path, "flow", np.zeros(4), IDS)


@pytest.mark.parametrize("name", ["../flow", "", "a/b", "x" * 32, "a.b"])
def test_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(DataError, match="must match"):
        write_side_column(tmp_path, name, np.zeros(5), IDS)


def test_every_flipped_byte_is_noticed(tmp_path):
    path = write_side_column(tmp_path, "flow", np.arange(5.0), IDS)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(DataError, match="flow"):
            read_side_column(tmp_path, "flow", IDS)
