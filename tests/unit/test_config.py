"""Configs are strict: precedence, nearest names, and a file that comes back as it was written."""

from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from megacogvx.config import PresetSection, Section, build_config, dump_config, load_config, read_yaml, write_config
from megacogvx.errors import ConfigError


class Model(Section):
    num_layers: int = Field(2, ge=1)
    hidden_size: int = 64
    dropout: float = 0.0

    @field_validator("hidden_size")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value


class Switches(Section):
    strict: bool = False
    depth: bool | int = 0


class Run(Section):
    folder: Path = Path("runs/default")
    precision: Literal["fp32", "bf16"] = "fp32"
    paths: tuple[str, ...] = ()
    limit: int | None = None


class Root(Section):
    model: Model = Model()
    run: Run = Run()


class Needy(Section):
    path: str
    model: Model = Model()


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  num_layers: 4\n  dropout: 0.5\n")
    return path


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(config_file):
    config = load_config(Root, config_file, ["model.num_layers=8", "run.paths=[a, b]", "run.limit=3"])
    assert config.model == Model(num_layers=8, hidden_size=64, dropout=0.5)
    assert config.run == Run(paths=("a", "b"), limit=3)


@pytest.mark.parametrize("setting", ["model.num_layers=true", "model.dropout=false", "run.limit=yes"])
def test_true_is_not_one(setting):
    section, name = setting.split("=")[0].split(".")
    with pytest.raises(ConfigError, match=rf"{section}: {name}=(True|False) is true or false, where a number belongs"):
        load_config(Root, None, [setting])
    assert load_config(Switches, None, ["strict=true", "depth=true"]).depth is True
    assert load_config(Root, None, ["run.limit=1.0", "model.dropout=0"]).run.limit == 1


def test_the_last_of_two_overrides_wins():
    assert load_config(Root, None, ["run.limit=1", "run.limit=null"]).run.limit is None


def test_a_value_may_hold_an_equals_sign():
    assert load_config(Root, None, ["run.folder=runs/lr=1e-4"]).run.folder == Path("runs/lr=1e-4")


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing set\n")
    assert load_config(Root, tmp_path / "empty.yaml") == Root()


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Root().model.num_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model.num_layer=3", r"unknown key model\.num_layer; did you mean model\.num_layers\?"),
        ("modle.num_layers=3", r"unknown key modle; did you mean model\?"),
        ("model.zzz=3", r"unknown key model\.zzz; known keys: num_layers, hidden_size, dropout"),
        ("rum.limit=3", r"did you mean run\?"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(override, hint):
    with pytest.raises(ConfigError, match=hint):
        load_config(Root, None, [override])


@given(st.sampled_from(["num_layers", "hidden_size", "dropout"]), st.data())
def test_a_key_with_one_letter_missing_finds_its_name(name, data):
    place = data.draw(st.integers(0, len(name) - 1))
    with pytest.raises(ConfigError, match=rf"did you mean model\.{name}\?"):
        load_config(Root, None, [f"model.{name[:place] + name[place + 1 :]}=1"])


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.num_layers=0", r"model\.num_layers=0: .*greater than or equal to 1"),
        ("model.num_layers=two", r"model\.num_layers='two': .*valid integer"),
        ("model.num_layers=1.5", r"model\.num_layers=1\.5: .*valid integer"),
        ("model.hidden_size=7", r"model\.hidden_size=7: must be even"),
        ("run.precision=fp8", r"run\.precision='fp8': .*'fp32' or 'bf16'"),
        ("model=3", r"model=3"),
        ("model.num_layers.deep=1", r"model\.num_layers: "),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_rule(override, text):
    with pytest.raises(ConfigError, match=text):
        load_config(Root, None, [override])


def test_every_problem_is_told_at_once():
    with pytest.raises(ConfigError, match=r"overrides: model\.num_layers=0.*; model\.hidden_size=7.*; unknown key rum"):
        load_config(Root, None, ["model.num_layers=0", "model.hidden_size=7", "rum=1"])


def test_a_required_key_is_named():
    with pytest.raises(ConfigError, match=r"needy\.yaml: path is required"):
        build_config(Needy, {}, source="needy.yaml")


@pytest.mark.parametrize("override", ["model.num_layers", "=3", ""])
def test_an_override_needs_a_key_and_an_equals_sign(override):
    with pytest.raises(ConfigError, match=r"not of the form section\.key=value"):
        load_config(Root, None, [override])


def test_an_override_inside_a_value_is_refused(config_file):
    with pytest.raises(ConfigError, match="num_layers is a value, not a section"):
        load_config(Root, config_file, ["model.num_layers.deep=1"])


def test_an_override_has_to_be_yaml():
    with pytest.raises(ConfigError, match=r"override 'run\.paths=\[a': the value is not valid YAML"):
        load_config(Root, None, ["run.paths=[a"])


def test_a_missing_file_lists_its_neighbours(config_file):
    with pytest.raises(ConfigError, match=r"rum\.yaml does not exist; YAML files in its folder: run\.yaml"):
        read_yaml(config_file.with_name("rum.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping of sections, not a list"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_safe_yaml_mapping_is_refused(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "bad.yaml")


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")


NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20)


@given(
    layers=st.integers(1, 10**9),
    dropout=st.floats(allow_nan=False, allow_infinity=False),
    paths=st.lists(NAMES, max_size=3).map(tuple),
    limit=st.none() | st.integers(),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_a_written_config_reads_back_equal(tmp_path_factory, layers, dropout, paths, limit, precision):
    config = Root(
        model=Model(num_layers=layers, dropout=dropout), run=Run(paths=paths, limit=limit, precision=precision)
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    write_config(config, path)
    assert load_config(Root, path) == config
    assert read_yaml(path) == dump_config(config)


def test_a_written_config_holds_plain_values_in_the_order_of_the_fields(tmp_path):
    write_config(Root(), tmp_path / "config.yaml")
    values = read_yaml(tmp_path / "config.yaml")
    assert list(values) == ["model", "run"]
    assert list(values["model"]) == ["num_layers", "hidden_size", "dropout"]
    assert values["run"] == {"folder": "runs/default", "precision": "fp32", "paths": [], "limit": None}


class Sized(PresetSection):
    presets: ClassVar = {"small": {"width": 8, "depth": 2}, "large": {"width": 64}}
    width: int = 16
    depth: int = 4


class SizedRoot(Section):
    model: Sized = Sized()


def _sized(**values):
    return build_config(SizedRoot, {"model": values}).model


def test_a_preset_lies_between_the_defaults_and_what_is_given():
    assert (_sized().width, _sized().depth) == (16, 4)
    assert (_sized(preset="small").width, _sized(preset="small").depth) == (8, 2)
    assert (_sized(preset="large").width, _sized(preset="large").depth) == (64, 4)
    assert (_sized(preset="small", depth=9).width, _sized(preset="small", depth=9).depth) == (8, 9)
    assert _sized(**dump_config(_sized(preset="small", depth=9))) == _sized(preset="small", depth=9)


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"preset='smal' is unknown; did you mean small.*known presets: small, large"):
        _sized(preset="smal")
