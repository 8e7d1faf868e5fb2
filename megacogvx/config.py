"""Configs: YAML and dotted overrides to frozen, strict sections, and back.

A section is a `Section` subclass that stands beside the component it configures; a root config is a section whose
fields are sections. Order of precedence: default < preset < YAML < `section.key=value`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from megacogvx.errors import ConfigError


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error.

    A value of another type is one, too, unless nothing is lost: text that is a number becomes one, since YAML takes
    1e-4 for text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, arbitrary_types_allowed=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, values: Any) -> Any:
        """Refuse true and false for numbers; pydantic takes them for 1 and 0."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields:
                kind = cls.model_fields[name].annotation
                if {int, float} & {kind, *get_args(kind)} and bool not in get_args(kind):
                    raise ValueError(f"{name}={value} is true or false, where a number belongs")
        return values


class PresetSection(Section):
    """A section whose defaults a named preset may replace; settings that are given win over it.

    Attributes:
        presets: name -> settings, of the subclass.
        preset: a name of `presets`, or None.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    preset: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        """Put the preset's settings under the explicit ones."""
        if not isinstance(values, dict) or values.get("preset") is None:
            return values
        name = values["preset"]
        if name not in cls.presets:
            near = difflib.get_close_matches(str(name), cls.presets, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"preset={name!r} is unknown; {hint}known presets: {', '.join(cls.presets)}")
        return {**cls.presets[name], **values}


Root = TypeVar("Root", bound=Section)


def load_config(root: type[Root], path: Path | None = None, overrides: Iterable[str] = ()) -> Root:
    """Read `path` (YAML, may be None), apply `section.key=value` overrides, and return the checked config.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (the nearest name is suggested), a value has
            the wrong type or is out of range.
    """
    values = read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    return build_config(root, values, source=str(path) if path else "overrides")


def build_config(root: type[Root], values: dict[str, Any], source: str = "config") -> Root:
    """Return `root(**values)`, with pydantic's complaints turned into a `ConfigError`."""
    try:
        return root(**values)
    except ValidationError as error:
        lines = [_explain(root, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def dump_config(config: Section) -> dict[str, Any]:
    """Return the resolved config as plain values (str, int, float, bool, None, list, dict), ready for YAML."""
    return config.model_dump(mode="json")


def write_config(config: Section, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(yaml.safe_dump(dump_config(config), sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader."""
    if not path.is_file():
        near = [p.name for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist; YAML files in its folder: {', '.join(near) or 'none'}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, key = name.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
    try:
        place[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None


def _explain(root: type[Section], problem: Any) -> str:
    *sections, key = [str(part) for part in problem["loc"]] or ["config"]
    name = ".".join([*sections, key])
    if problem["type"] == "extra_forbidden":
        known = list(_fields_at(root, sections))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*sections, near[0]])}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {name}; {hint}"
    if problem["type"] == "missing":
        return f"{name} is required"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}={problem['input']!r}: {message}" if not isinstance(problem["input"], dict) else f"{name}: {message}"


def _fields_at(root: type[Section], sections: list[str]) -> dict[str, Any]:
    fields = root.model_fields
    for section in sections:
        kind = fields[section].annotation if section in fields else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return {}
        fields = kind.model_fields
    return fields
