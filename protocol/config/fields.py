"""The keys of a recipe, walked from the Structs of `settings.py`: for reading and help."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from protocol.config.settings import Section
from protocol.errors import did_you_mean


@dataclass(frozen=True)
class Field:
    """One key: `path` as written in flags, its type, and the section class that declares it."""

    path: str
    annotation: Any
    owner: type[Section]

    @property
    def name(self) -> str:
        """The key within its section."""
        return self.path.rpartition(".")[2]


def section_fields(cls: type[Section]) -> dict[str, Any]:
    """Names and types of a section's own fields, in order."""
    hints = get_type_hints(cls)
    return {name: hints[name] for name in cls.__struct_fields__}


def as_section(annotation: object) -> type[Section] | None:
    """Return the annotation where it is a section, else None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


def leaf_fields(cls: type[Section], prefix: str = "") -> list[Field]:
    """Every key of a recipe that holds a value, in the order of the settings."""
    found: list[Field] = []
    for name, annotation in section_fields(cls).items():
        path = f"{prefix}{name}"
        section = as_section(annotation)
        if section is not None:
            found += leaf_fields(section, f"{path}.")
        else:
            found.append(Field(path, annotation, cls))
    return found


def without_none(annotation: object) -> tuple[Any, bool]:
    """Split `T | None` into (T, True); any other type gives (T, False)."""
    if get_origin(annotation) in (Union, UnionType):
        rest = [arm for arm in get_args(annotation) if arm is not NoneType]
        if len(rest) == 1:
            return rest[0], True
    return annotation, False


def type_name(annotation: object) -> str:
    """How a type is shown to users: `int`, `float|none`, `lora|dora|full`, `list of str`."""
    inner, optional = without_none(annotation)
    origin = get_origin(inner)
    if origin is Literal:
        name = "|".join(str(choice) for choice in get_args(inner))
    elif origin is list:
        name = f"list of {type_name(get_args(inner)[0])}"
    elif origin is dict:
        name = "table of names"
    else:
        name = str(getattr(inner, "__name__", inner))
    return f"{name}|none" if optional else name


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a clause that names the nearest valid key, or "" where none is near.

    The same last name in another section comes before spelling: `sampling.beta` is
    `objective.beta`.
    """
    paths = list(valid)
    last = name.rpartition(".")[2]
    same = [path for path in paths if path.rpartition(".")[2] == last]
    close = same or difflib.get_close_matches(name, paths, n=1, cutoff=0.6)
    if not close:
        by_last = {path.rpartition(".")[2]: path for path in paths}
        close = [by_last[n] for n in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    return f"; did you mean {' or '.join(map(repr, close[:2]))}?" if close else ""


def nearest_choice(value: object, annotation: object) -> str:
    """Return a clause that names the choice nearest to a value, or "" where none is near."""
    inner, _ = without_none(annotation)
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    return did_you_mean(str(value), map(str, choices))


def defaults(cls: type[Section]) -> dict[str, Any]:
    """Return a run's defaults as nested plain values, with those it sets for its sections."""
    return msgspec.to_builtins(cls())
