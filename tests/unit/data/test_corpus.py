"""Corpus and the config section `data`."""

from pathlib import Path

import numpy as np
import pytest

from megacogvx.config import build_config
from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import Corpus, Group, integer_weights
from megacogvx.data.indexed import IndexedDataset
from megacogvx.data.indexed.side_columns import write_side_column
from megacogvx.errors import ConfigError, DataError
from megacogvx.pack_layout import tokens_of
from megacogvx.testing.tiny_dataset import tiny_encoder, write_tiny_dataset


@pytest.fixture
def folders(tmp_path):
    write_tiny_dataset(tmp_path / "a", 12, first_id=1000)
    write_tiny_dataset(tmp_path / "b", 5, first_id=2000)
    return str(tmp_path / "a"), str(tmp_path / "b")


def config(**values):
    return build_config(DataConfig, {"tokens_per_pack": 64, **values})


def test_indices_run_through_all_datasets(folders):
    corpus = Corpus(config(paths=folders))
    assert len(corpus) == 17
    assert corpus.columns.groups == (Group(0, 17, 1),)
    assert corpus.columns.sample_id.tolist() == [*range(1000, 1012), *range(2000, 2005)]
    for index in range(17):
        record, place = corpus.sample(index), corpus.place(index, (1, 2, 2))
        assert record.sample_id == place.sample_id == int(corpus.columns.sample_id[index])
        assert record.latents.shape[:3] == (place.grid[0], 2 * place.grid[1], 2 * place.grid[2])
        assert len(record.text) == place.text_length
    with pytest.raises(IndexError):
        corpus.sample(17)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2), (1, 1, 1)])
def test_lengths_are_those_of_tokens_of(folders, patch):
    columns = Corpus(config(paths=folders)).columns
    rows = zip(columns.frames, columns.height, columns.width, columns.text_length, strict=True)
    assert columns.lengths(patch).tolist() == [tokens_of(*map(int, row), patch) for row in rows]


def test_a_size_that_does_not_fit_the_patch_names_a_sample(folders):
    columns = Corpus(config(paths=folders)).columns
    columns.height[9] = 3
    with pytest.raises(DataError, match=rf"sample {columns.sample_id[9]}, the first of 1: latents of .* don't fit"):
        columns.lengths((1, 2, 2))


def test_weighted_datasets_are_groups(folders):
    columns = Corpus(config(paths=[[0.75, folders[0]], [0.25, folders[1]]])).columns
    assert columns.groups == (Group(0, 12, 3), Group(12, 5, 1))


def test_checksum_tells_data_and_weights(folders, tmp_path):
    def checksum(**values):
        return Corpus(config(**values)).columns.checksum

    plain, weighted = checksum(paths=folders), checksum(paths=[[1, folders[0]], [2, folders[1]]])
    assert plain == checksum(paths=folders)
    assert len({plain, weighted, checksum(paths=folders[::-1]), checksum(paths=folders[0])}) == 4


@pytest.mark.parametrize(
    "change", [{"text_kind": "real"}, {"text_length": 7}, {"vae_fingerprint": "other"}, {"text_width": 16}]
)
def test_different_encoders_do_not_mix(folders, tmp_path, change):
    write_tiny_dataset(tmp_path / "c", 3, first_id=3000, encoder=tiny_encoder(**change))
    with pytest.raises(DataError, match=rf"different encoders: {next(iter(change))}="):
        Corpus(config(paths=[folders[0], str(tmp_path / "c")]))


def test_an_id_occurs_once(folders, tmp_path):
    write_tiny_dataset(tmp_path / "c", 3, first_id=1011)
    with pytest.raises(DataError, match="sample id 1011 occurs 2 times"):
        Corpus(config(paths=[folders[0], str(tmp_path / "c")]))
    with pytest.raises(ConfigError, match="twice"):
        Corpus(config(paths=[folders[0], folders[0]]))


def test_integer_weights():
    assert integer_weights([0.5, 0.25, 0.25]) == [2, 1, 1]
    assert integer_weights([3, 1]) == [3, 1]
    assert integer_weights([]) == []
    assert min(integer_weights([1.0, 1e-9])) == 1
    weights = np.array(integer_weights([1, 1, 1]))
    assert np.ptp(weights) == 0
    for given in ([5e7, 1e6, 2000], [0.99985, 0.00015], [1 / 3, 2 / 3], [0.7, 0.1, 0.2]):
        found = np.array(integer_weights(given))
        assert found / found.sum() == pytest.approx(np.array(given) / sum(given), rel=2e-3)
    assert integer_weights([1 / 3, 2 / 3]) == [3333, 6667], "plans of earlier runs stay what they are"


def test_the_mean_length_is_that_of_the_samples_that_are_drawn(folders):
    one, other = (Corpus(config(paths=[folder])).columns.lengths((1, 2, 2)).mean() for folder in map(str, folders[:2]))
    assert one != other
    weighted = Corpus(config(paths=[[9.0, str(folders[0])], [1.0, str(folders[1])]]))
    assert weighted.columns.mean_length((1, 2, 2)) == pytest.approx(0.9 * one + 0.1 * other)
    joined = Corpus(config(paths=[str(folders[0]), str(folders[1])])).columns
    assert joined.mean_length((1, 2, 2)) == pytest.approx(joined.lengths((1, 2, 2)).mean())


def test_scores_are_joined_and_leave_the_checksum(folders):
    thresholds = [{"column": "flow", "minimum": 1}]
    with pytest.raises(DataError, match="no side column 'flow'"):
        Corpus(config(paths=folders, thresholds=thresholds))
    for folder in folders:
        ids = IndexedDataset(folder).sample_id
        write_side_column(Path(folder), "flow", ids.astype(float), ids)
    columns = Corpus(config(paths=folders, thresholds=thresholds)).columns
    assert columns.scores["flow"].tolist() == columns.sample_id.tolist()
    assert columns.checksum == Corpus(config(paths=folders)).columns.checksum
