"""A run's configuration: TOML and flags in, one checked Struct out.

Flags are `--section.key value` or `--section.key=value` and override the file. TOML has no null:
the word "none" gives None to keys that may be None, in files and flags alike. Lists in flags are
comma-separated or in TOML's syntax, tables `name=other,…` or in TOML's syntax. Every error names
the path of the field, where it was written and, for unknown keys, the nearest valid one.
"""

import logging
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import msgspec

from protocol.config.checks import check
from protocol.config.fields import Section, check_value, is_union, leaf_fields, without_none
from protocol.config.settings import PROGRAMS, AnyRun
from protocol.config.unknown_keys import unknown_key
from protocol.errors import ConfigError

RunT = TypeVar("RunT", bound=AnyRun)
log = logging.getLogger("pippin.config")

_BOOLEANS = {"true": True, "false": False}


def load(
    cls: type[RunT],
    path: Path | None,
    flags: Sequence[str] = (),
    *,
    also_accepts: type[AnyRun] | None = None,
) -> RunT:
    """Read a recipe and flags into the run's settings, checked.

    Keys of the file that only `also_accepts`, the recipe of another program, has are left out and
    named in the log. Raises ConfigError for a file that cannot be read, unknown keys, bad values
    and clashes.
    """
    fields = leaf_fields(cls)
    accepted = (leaf_fields(also_accepts) if also_accepts else {}) | fields
    values = {key: field.default for key, field in fields.items()}
    labels = {key: key for key in fields}

    if path is not None:
        for key, value in _flatten(read_toml(path), str(path)):
            if key not in accepted:
                raise ConfigError(f"{path}: {unknown_key(cls, key, flag=False)}")
            optional = without_none(accepted[key].plain)[1]
            values[key] = None if optional and value == "none" else value
            labels[key] = f"{path}: {key}"
    for key, text in split_flags(flags):
        if key in _sections():
            raise ConfigError(f"--{key} is a section: name one of its keys, --{key}.key value")
        if key not in fields:
            raise ConfigError(unknown_key(cls, key, flag=True))
        values[key] = _parse_text(key, text, fields[key].plain)
        labels[key] = f"--{key}"

    for key, value in values.items():
        check_value(accepted[key], value, labels[key])
    unread = [key for key in values if key not in fields]
    if unread:
        log.warning("%s: not read by %s, left out", ", ".join(unread), PROGRAMS[cls])

    run = msgspec.convert(_nest({key: values[key] for key in fields}), cls)
    check(run)
    return run


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


@cache
def _sections() -> set[str]:
    """Return the paths of every program's sections."""
    paths = (field.section for cls in PROGRAMS for field in leaf_fields(cls).values())
    return {path for section in paths for path in (section, section.partition(".")[0])}


def _flatten(table: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a TOML file as (path, value), also where no program has them."""
    for name, value in table.items():
        path = f"{prefix}{name}"
        # Other programs' sections are opened too, so that errors name the key.
        if path not in _sections():
            yield path, value
        elif isinstance(value, dict):
            yield from _flatten(cast("dict[str, Any]", value), where, f"{path}.")
        else:
            raise ConfigError(f"{where}: [{path}] is a section of keys, not {value!r}")


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


def _parse_text(key: str, text: str, annotation: object) -> object:
    """Read a flag's text as its type; what does not fit is left to the conversion's error."""
    inner, optional = without_none(annotation)
    origin = get_origin(inner)
    if optional and text.lower() == "none":
        return None
    if origin is Literal:
        return next((choice for choice in get_args(inner) if str(choice) == text), text)
    if is_union(inner):
        # What no arm reads stays text, which is the value of an arm such as "auto".
        read = (_parse_text(key, text, arm) for arm in get_args(inner))
        return next((value for value in read if value != text), text)
    if origin is list:
        item = get_args(inner)[0]
        if text.lstrip().startswith("["):
            return _toml_value(key, text)
        return [_parse_text(key, part.strip(), item) for part in text.split(",") if part.strip()]
    if origin is dict:
        return _parse_table(key, text)
    if inner is bool:
        return _BOOLEANS.get(text.lower(), text)
    if inner in (int, float):
        for number in (int, inner):
            with suppress(ValueError):
                return number(text)
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
            lines.append(f"{name} = {toml_text(value)}")
    for path, table in tables:
        lines += ["", f"[{path}]"]
        _emit(table, f"{path}.", lines)


def toml_text(value: object) -> str:
    """Write one value as TOML; None is the word "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's string escapes are a subset of TOML's, except that TOML also bars DEL.
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(toml_text(item) for item in cast('list[Any]', value))}]"
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        inner = ", ".join(f"{toml_text(key)} = {toml_text(item)}" for key, item in items)
        return f"{{{inner}}}"
    return repr(value)
