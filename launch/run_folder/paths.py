"""The paths in a recipe and its flags: looked up and made absolute.

Keys that hold paths are marked by their types in `protocol/config`. Relative paths of a recipe file
(model, data, prepare, rewards…) are taken from the recipe's folder where they exist there,
otherwise from the current folder, as those of flags are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from msgspec import structs

from protocol.config.fields import Field, Section, extra, leaf_fields, value_of
from protocol.config.load import split_flags
from protocol.config.settings import PROGRAMS, AnyRun
from protocol.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")


def require_files(run: AnyRun) -> None:
    """Refuse data files that are not there, before a model is loaded for them."""
    for key, field in leaf_fields(type(run)).items():
        if extra(field.annotation, "path") != "data":
            continue
        text = str(value_of(run, key))
        file = Path(text).expanduser()
        named = file.suffix.lower() in DATA_SUFFIXES and not any(mark in text for mark in "*[:")
        if named and not file.exists():
            raise ConfigError(f"{key} {text}: no such file (looked at {file.absolute()})")


def resolve_flags(flags: Sequence[str], base: Path) -> list[str]:
    """Return flags as `--key=value`, with the paths that exist under `base` made absolute."""
    fields = {key: field for cls in PROGRAMS for key, field in leaf_fields(cls).items()}
    resolved: list[str] = []
    for key, text in split_flags(flags):
        value, field = text, fields.get(key)
        if field is not None and extra(field.annotation, "path"):
            several = isinstance(field.default, list) and not text.lstrip().startswith("[")
            parts = [part.strip() for part in text.split(",")] if several else [text]
            value = ",".join(_resolved(part, field, base) for part in parts)
        resolved.append(f"--{key}={value}")
    return resolved


def resolve_path(text: str, base: Path) -> str:
    """Return `text` as an absolute path if its file part exists under `base` or the current folder.

    The file part of "file.py:function" is what stands before the last colon; all else (hub ids,
    modules, "base", URLs) comes back as it is.
    """
    if not text or "://" in text:
        return text
    head, colon, tail = text.rpartition(":")
    if not (colon and head.endswith(".py")):
        head, colon, tail = text, "", ""
    for folder in (base, Path.cwd()):
        if (folder / head).exists():
            return f"{(folder / head).resolve()}{colon}{tail}"
    return text


def resolve_paths(section: SectionT, base: Path) -> SectionT:
    """Return a run, or a section of one, with the paths of its recipe made absolute."""
    fields = leaf_fields(type(section))
    changes: dict[str, Any] = {}
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            changes[name] = resolve_paths(value, base)
        else:
            changes[name] = _resolved(value, fields[name], base)
    return structs.replace(section, **changes)


def _resolved(value: Any, field: Field, base: Path) -> Any:  # noqa: ANN401 - of any field
    """Return a value, or a list's items, made absolute where the field's type marks a path."""
    if isinstance(value, list):
        return [_resolved(item, field, base) for item in cast("list[Any]", value)]
    marked = extra(field.annotation, "path")
    words: tuple[str, ...] = extra(field.annotation, "not_paths") or ()
    return resolve_path(value, base) if marked and value not in words else value
