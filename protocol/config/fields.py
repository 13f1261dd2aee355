"""The types of fields, the walk over a recipe's keys, and the check of one value."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from protocol.errors import ConfigError, did_you_mean


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section of a recipe."""


def doc(text: str) -> Meta:
    """Return the help text of a field, in Markdown."""
    return Meta(description=text)


PositiveInt = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
# Nothing would be done with 0, so it is refused rather than read as "all".
CountOrAll = Annotated[int, Meta(ge=-1, extra={"refused": 0})]
Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
UpToOne = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]

# launch/run_folder/paths.py makes fields of these types absolute.
LocalPath = Annotated[str, Meta(extra={"path": "file or folder"})]
DataPath = Annotated[str, Meta(extra={"path": "data"})]
PathOrId = Annotated[str, Meta(min_length=1, extra={"path": "folder or hub id"})]
FunctionName = Annotated[str, Meta(extra={"path": "file.py:function"})]


@dataclass(frozen=True)
class Field:
    """One key: `path` as written in flags, type with and without `Meta`, default, and section."""

    path: str
    annotation: Any
    plain: Any
    default: Any
    owner: type[Section]

    @property
    def section(self) -> str:
        """The path of the key's section."""
        return self.path.rpartition(".")[0]

    @property
    def description(self) -> str:
        """The help text."""
        return next(meta.description for meta in metas(self.annotation) if meta.description)

    @property
    def type_name(self) -> str:
        """How the type is shown to users: `int`, `float|none`, `lora|dora|full`, `list of str`."""
        return _type_name(self.plain)

    @property
    def bounds(self) -> str:
        """The bounds in words, such as "at least 1" or "in (0, 1]"; "" where there are none."""
        found = metas(self.annotation)
        bounds = {
            name: bound
            for meta in found
            for name in ("ge", "gt", "le", "lt", "min_length")
            if (bound := getattr(meta, name)) is not None
        }
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        if any("refused" in (meta.extra or {}) for meta in found):
            return "-1 or at least 1"  # CountOrAll
        if high is not None:
            left, right = "[" if "ge" in bounds else "(", "]" if "le" in bounds else ")"
            return f"in {left}{low}, {high}{right}"
        if "gt" in bounds:
            return "positive" if low == 0 else f"above {low}"
        if low is not None:
            return f"at least {low}"
        return "non-empty" if "min_length" in bounds else ""


@cache
def leaf_fields(cls: type[Section]) -> dict[str, Field]:
    """Every key of a recipe or section that holds a value, by path, in the order of the Structs."""
    return {field.path: field for field in _walk(cls(), "")}


def _walk(section: Section, prefix: str) -> Iterator[Field]:
    # From an instance, because a run may set other defaults for a section than the section's own.
    cls = type(section)
    full, plain = get_type_hints(cls, include_extras=True), get_type_hints(cls)
    for name in cls.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield Field(f"{prefix}{name}", full[name], plain[name], value, cls)


def value_of(section: Section, path: str) -> object:
    """Return the value of a key, given as its path."""
    value: object = section
    for name in path.split("."):
        value = getattr(value, name)
    return value


def is_union(annotation: object) -> bool:
    """Whether a type is `A | B`."""
    return get_origin(annotation) in (Union, UnionType)


def without_none(annotation: object) -> tuple[Any, bool]:
    """Split `T | None` into (T, True); any other type gives (T, False)."""
    if is_union(annotation):
        rest = [arm for arm in get_args(annotation) if arm is not NoneType]
        if len(rest) == 1:
            return rest[0], True
    return annotation, False


def metas(annotation: object) -> list[Meta]:
    """Return the `Meta` of a type, of the arms of a union, and of a list's items."""
    inner, _ = without_none(annotation)
    if get_origin(inner) is Annotated:
        return [*metas(get_args(inner)[0]), *inner.__metadata__]
    if is_union(inner):
        return [meta for arm in get_args(inner) for meta in metas(arm)]
    return metas(get_args(inner)[0]) if get_origin(inner) is list else []


def extra(annotation: object, name: str) -> Any:  # noqa: ANN401 - any mark
    """Return a mark of a type, which stands in its `Meta(extra=…)`, or None."""
    marks: dict[str, Any] = {}
    for meta in metas(annotation):
        marks |= meta.extra or {}
    return marks.get(name)


def _type_name(plain: object) -> str:
    inner, optional = without_none(plain)
    origin = get_origin(inner)
    if origin is Literal:
        name = "|".join(str(choice) for choice in get_args(inner))
    elif is_union(inner):
        name = "|".join(_type_name(arm) for arm in get_args(inner))
    elif origin is list:
        name = f"list of {_type_name(get_args(inner)[0])}"
    elif origin is dict:
        name = "table of names"
    else:
        name = str(getattr(inner, "__name__", inner))
    return f"{name}|none" if optional else name


def check_value(field: Field, value: object, label: str) -> None:
    """Raise ConfigError for a value that is not of the field's type or outside its bounds.

    `label` says where the value stands, such as "--train.max_steps".
    """
    if not _fits(value, field.plain):
        inner, _ = without_none(field.plain)
        choices = map(str, get_args(inner)) if get_origin(inner) is Literal else ()
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{label} must be {field.type_name}, got {value!r}{hint}")
    # Infinity passes most bounds, and keys without bounds take NaN.
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{label} must be a finite {field.type_name}, got {value!r}")

    refused = extra(field.annotation, "refused")
    if not _fits(value, field.annotation) or (refused is not None and value == refused):
        rule = f"none or {field.bounds}" if without_none(field.plain)[1] else field.bounds
        raise ConfigError(f"{label} must be {rule}, got {value!r}. {field.description}")


def _fits(value: object, annotation: object) -> bool:
    try:
        msgspec.convert(value, annotation)
    except msgspec.ValidationError:
        return False
    return True


def check_section(section: Section, path: str) -> None:
    """Check the values of a section that was made in Python, where msgspec checks nothing."""
    for field in leaf_fields(type(section)).values():
        check_value(field, value_of(section, field.path), f"{path}.{field.path}")
