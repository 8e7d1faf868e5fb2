import argparse

import pytest

from megacogvx.errors import ConfigError
from megacogvx.inference.coding import add_coding_arguments, coding_of
from megacogvx.models.vae import CHUNKED, WHOLE, Coding, Tile


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], WHOLE),
        (["--vae-mode", "chunked"], CHUNKED),
        (["--vae-mode", "tiled", "--vae-chunk", "4", "--vae-tile", "48", "80"], Coding(4, Tile(48, 80))),
    ],
)
def test_options_choose_the_coding(words, expected):
    parser = argparse.ArgumentParser()
    add_coding_arguments(parser)
    assert coding_of(parser.parse_args(words)) == expected


def test_a_tile_without_tiles_is_a_config_error():
    parser = argparse.ArgumentParser()
    add_coding_arguments(parser)
    with pytest.raises(ConfigError, match="use tiled"):
        coding_of(parser.parse_args(["--vae-tile", "48", "80"]))
