"""`megacogvx data info` and `verify`."""

import argparse

import pytest

from megacogvx.data import commands
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import write_tiny_dataset


@pytest.fixture
def folder(tmp_path):
    write_tiny_dataset(tmp_path / "data", 12)
    return tmp_path / "data"


def run(*words):
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    commands.run(parser.parse_args(list(map(str, words))))


def test_info_shows_what_is_inside(folder, capsys):
    run("info", folder)
    shown = capsys.readouterr().out
    for text in ("12", "shard-00000", "shard-00001", "padded, up to 6 tokens of width 8", "5 x 4 x 4", "25.0%"):
        assert text in shown
    # 12 texts of 6 x 8 bf16 values, five kinds in each of two shards: 2 are shared
    assert "192 B saved" in shown


def test_verify_is_content_with_sound_data(folder, capsys):
    run("verify", folder)
    assert "sound" in capsys.readouterr().out


def test_verify_lists_damage_and_fails(folder, capsys):
    path = folder / "shard-00001.bin"
    data = bytearray(path.read_bytes())
    data[130] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"damaged: .*data"):
        run("verify", folder)
    shown = capsys.readouterr().out
    assert "damaged" in shown
    assert "1006" in shown


def test_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json"):
        run("info", tmp_path)


def test_a_subcommand_is_needed():
    with pytest.raises(SystemExit):
        run()
