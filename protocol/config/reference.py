"""Every key with its type, default, bounds and meaning, for `--help` and for docs/reference.md.

`uv run python -m protocol.config.reference > docs/reference.md`
"""

import inspect
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby

from protocol.config.fields import Field, Section, leaf_fields
from protocol.config.load import toml_text
from protocol.config.settings import PROGRAMS, AnyRun

HEAD = """# Configuration reference

Every key that a recipe may hold, as TOML in a file or as a flag (`--train.max_steps 10`), which
overrides the file. TOML has no null: the word `none` stands for it. A key that a program does not
read is refused. This page is generated from `protocol/config`; do not edit it, run

    uv run python -m protocol.config.reference > docs/reference.md
"""

# The keys of a section's variants, by path and meaning, with the programs that read each.
Keys = dict[tuple[str, str], list[tuple[str, Field]]]


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


def reference() -> str:
    """Return docs/reference.md."""
    # Sections derived from one base share a table; [objective] has one per program.
    tables: dict[tuple[str, type], Keys] = {}
    for cls, program in PROGRAMS.items():
        for section, fields in by_section(cls):
            keys = tables.setdefault((section, _base(fields[0].owner)), {})
            for field in fields:
                keys.setdefault((field.path, field.description), []).append((program, field))

    lines = [HEAD, "## Programs", ""]
    for cls, program in PROGRAMS.items():
        titles = [_title(name, program) for name, _ in by_section(cls)]
        links = ", ".join(f"[{title}](#{_anchor(title)})" for title in titles)
        lines += [f"- `{program}`: {first_line(cls).partition(': ')[2]}", f"  Sections: {links}."]

    for (name, base), keys in tables.items():
        program, _ = next(iter(keys.values()))[0]
        lines += ["", f"## {_title(name, program)}", "", first_line(base), "", *_table(keys)]
    return "\n".join(lines) + "\n"


def _base(owner: type) -> type:
    """Return the section that `owner` is derived from, directly below `Section`."""
    return owner.__mro__[owner.__mro__.index(Section) - 1]


def _title(section: str, program: str) -> str:
    return f"objective of {program}" if section == "objective" else section


def _anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _table(keys: Keys) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    everyone = {program for found in keys.values() for program, _ in found}
    for (path, text), found in keys.items():
        _, field = found[0]
        kind = field.type_name.replace("|", r"\|") + (f", {field.bounds}" if field.bounds else "")

        default = f"`{default_text(field)}`"
        for program, other in found:
            if other.default != field.default:
                default += f"; `{default_text(other)}` in {program}"

        programs = [program for program, _ in found]
        only = "" if set(programs) == everyone else f" *Only {', '.join(programs)}.*"
        yield f"| `{path}` | {kind} | {default} | {text}{only} |"


if __name__ == "__main__":
    sys.stdout.write(reference())
