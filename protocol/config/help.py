"""The text of `--help`: every key with its type, default, bounds and meaning."""

import inspect
import textwrap
from itertools import groupby

from protocol.config.fields import Field, leaf_fields
from protocol.config.load import toml_text
from protocol.config.settings import AnyRun


def help_text(cls: type[AnyRun], usage: str) -> str:
    """Return the help of a program whose recipe is `cls`: `usage`, then every key."""
    lines = [usage, "", "The recipe is TOML; flags override it. Keys, types, defaults:"]
    for section, fields in by_section(cls):
        lines += ["", f"[{section}]  {first_line(fields[0].owner)}"]
        for field in fields:
            bounds = f"  ({field.bounds})" if field.bounds else ""
            lines.append(f"  --{field.path} {field.type_name} = {default_text(field)}{bounds}")
            indent = " " * 8
            text = field.description
            lines += textwrap.wrap(text, 92, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines) + "\n"


def by_section(cls: type[AnyRun]) -> list[tuple[str, list[Field]]]:
    """Return each section of a recipe with its keys; a section's own come before nested ones."""
    fields = list(leaf_fields(cls).values())
    order = list(dict.fromkeys(field.section for field in fields))
    # [model] goes on after [model.lora] where a section adds keys to its base.
    fields.sort(key=lambda field: (order.index(field.section.partition(".")[0]), field.section))
    return [(name, list(found)) for name, found in groupby(fields, lambda field: field.section)]


def first_line(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").splitlines()[0]


def default_text(field: Field) -> str:
    """Write a key's default as in TOML, but none without its quotes."""
    return "none" if field.default is None else toml_text(field.default)
