"""A run's configuration: TOML and flags in, one checked Struct out.

Flags are `--section.key value` or `--section.key=value` and override the file. TOML has no null:
the word "none" gives None to keys that may be None, in files and flags alike. Lists in flags are
comma-separated or in TOML's syntax, tables `name=other,…` or in TOML's syntax. Every error names
the path of the field, where it was written and, for unknown keys, the nearest valid one.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import msgspec

from protocol.config.checks import check
from protocol.config.fields import (
    as_section,
    defaults,
    leaf_fields,
    nearest,
    nearest_choice,
    section_fields,
    type_name,
    without_none,
)
from protocol.config.settings import GrpoRun, PreferenceRun, Section, SftRun
from protocol.errors import ConfigError

RunT = TypeVar("RunT", GrpoRun, PreferenceRun, SftRun)

_BOOLEANS = {"true": True, "false": False}


def load(cls: type[RunT], path: Path | None, flags: Sequence[str] = ()) -> RunT:
    """Read a recipe and flags into the run's settings, checked.

    Raises ConfigError for a file that cannot be read, unknown keys, bad values and clashes.
    """
    tree = defaults(cls)
    origin: dict[str, str] = {}
    if path is not None:
        _merge(tree, read_toml(path), cls, "", str(path), origin)
    for key, text in split_flags(flags):
        _set_flag(tree, cls, key, text, origin)
    settings = _convert(cls, tree, origin)
    check(settings, {path for path, where in origin.items() if where == "flag"})
    return settings


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; ConfigError says what is wrong with it and where."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        message = f"recipe {path} does not exist; give the path of a TOML file"
        raise ConfigError(message) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from error


def split_flags(flags: Sequence[str]) -> list[tuple[str, str]]:
    """Split `--a.b value` and `--a.b=value` into (key, text) pairs, in order."""
    pairs: list[tuple[str, str]] = []
    rest = list(flags)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"{word!r} is not a flag: flags are --section.key value; a recipe comes first"
            )
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} value, or --{key}=value")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def _merge(
    tree: dict[str, Any],
    given: Mapping[str, Any],
    cls: type[Section],
    prefix: str,
    where: str,
    origin: dict[str, str],
) -> None:
    fields = section_fields(cls)
    for name, value in given.items():
        path = f"{prefix}{name}"
        if name not in fields:
            raise _unknown(cls, prefix, path, where)
        section = as_section(fields[name])
        if section is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: [{path}] is a section of keys, not {value!r}")
            table = cast("dict[str, Any]", value)
            _merge(tree[name], table, section, f"{path}.", where, origin)
        else:
            tree[name] = _none_word(value, fields[name])
            origin[path] = where


def _unknown(cls: type[Section], prefix: str, path: str, where: str) -> ConfigError:
    kind = "key" if prefix else "section"
    valid = [f"{prefix}{field.path}" for field in leaf_fields(cls)]
    if not prefix:
        valid = list(section_fields(cls))
    hint = nearest(path, valid) or f"; valid here: {', '.join(valid)}"
    return ConfigError(f"{where}: unknown {kind} {path!r}{hint}")


def _none_word(value: object, annotation: object) -> object:
    return None if without_none(annotation)[1] and value == "none" else value


def _set_flag(
    tree: dict[str, Any], cls: type[Section], key: str, text: str, origin: dict[str, str]
) -> None:
    fields = {field.path: field for field in leaf_fields(cls)}
    if key not in fields:
        if any(path.startswith(f"{key}.") for path in fields):
            raise ConfigError(f"--{key} is a section: name one of its keys, --{key}.key value")
        hint = nearest(key, fields) or "; --help lists every key"
        raise ConfigError(f"unknown key --{key}{hint}")
    *sections, name = key.split(".")
    for section in sections:
        tree = tree[section]
    tree[name] = _parse_text(key, text, fields[key].annotation)
    origin[key] = "flag"


def _parse_text(key: str, text: str, annotation: object) -> object:
    """Read a flag's text as its type; what does not fit is left to the conversion's error."""
    inner, optional = without_none(annotation)
    origin = get_origin(inner)
    if optional and text.lower() == "none":
        return None
    if origin is Literal:
        return next((choice for choice in get_args(inner) if str(choice) == text), text)
    if origin is list:
        item = get_args(inner)[0]
        if text.lstrip().startswith("["):
            return _toml_value(key, text)
        return [_parse_text(key, part.strip(), item) for part in text.split(",") if part.strip()]
    if origin is dict:
        return _parse_table(key, text)
    if inner is bool:
        return _BOOLEANS.get(text.lower(), text)
    for number in (int, float):
        if inner in (int, float) and number in (int, inner):
            try:
                return number(text)
            except ValueError:
                continue
    return text


def _parse_table(key: str, text: str) -> object:
    if text.lstrip().startswith("{"):
        return _toml_value(key, text)
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(equals for _, equals, _ in pairs):
        raise ConfigError(f"--{key}: a table is name=other,name=other; got {text!r}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _toml_value(key: str, text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--{key}: {text!r} is not a TOML value: {error}") from error


def _convert(cls: type[RunT], tree: dict[str, Any], origin: Mapping[str, str]) -> RunT:
    for field in leaf_fields(cls):
        value: Any = tree
        for name in field.path.split("."):
            value = value[name]
        where = origin.get(field.path, "default")
        label = f"--{field.path}" if where == "flag" else f"{where}: {field.path}"
        required = type_name(field.annotation)
        try:
            msgspec.convert(value, field.annotation)
        except msgspec.ValidationError as error:
            hint = nearest_choice(value, field.annotation)
            raise ConfigError(f"{label} must be {required}, got {value!r}{hint}") from error
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{label} must be a finite {required}, got {value!r}")
    return msgspec.convert(tree, cls)


def to_toml(settings: Section) -> str:
    """Write settings as TOML that `load` reads back to an equal Struct."""
    lines: list[str] = []
    _emit(settings, "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _emit(section: Section, prefix: str, lines: list[str]) -> None:
    tables: list[tuple[str, Section]] = []
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            tables.append((f"{prefix}{name}", value))
        else:
            lines.append(f"{name} = {_toml_text(value)}")
    for path, table in tables:
        lines += ["", f"[{path}]"]
        _emit(table, f"{path}.", lines)


def _toml_text(value: object) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's string escapes are a subset of TOML's, except that TOML also bars DEL.
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(_toml_text(item) for item in cast('list[Any]', value))}]"
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        inner = ", ".join(f"{_toml_text(key)} = {_toml_text(item)}" for key, item in items)
        return f"{{{inner}}}"
    return repr(value)
