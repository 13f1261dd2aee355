"""The text of `--help`: every key with its type, default and comment."""

import ast
import inspect
import io
import textwrap
import tokenize
from typing import Any

from protocol.config import settings
from protocol.config.fields import defaults, leaf_fields, type_name
from protocol.config.unread import readers


def field_comments(source: str) -> dict[tuple[str, str], str]:
    """Map (class, field) to the comment on the lines of the field's declaration."""
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                lines = range(item.lineno, (item.end_lineno or item.lineno) + 1)
                text = " ".join(by_line[line] for line in lines if line in by_line)
                found[node.name, item.target.id] = text
    return found


def _value(tree: dict[str, Any], path: str) -> object:
    value: Any = tree
    for name in path.split("."):
        value = value[name]
    return value


def help_text(cls: type[settings.Section], usage: str) -> str:
    """Return the help of a program whose recipe is `cls`: `usage`, then every key that it reads."""
    comments = field_comments(inspect.getsource(settings))
    values = defaults(cls)
    lines = [usage, "", "The recipe is TOML; flags override it. Keys, types, defaults:"]
    heading = ""
    fields = [field for field in leaf_fields(cls) if readers(cls, field.path) is None]
    sections = list(dict.fromkeys(field.path.rpartition(".")[0] for field in fields))
    # A section's own keys stand together, before those of the sections in it.
    for field in sorted(fields, key=lambda field: sections.index(field.path.rpartition(".")[0])):
        section = field.path.rpartition(".")[0]
        if section != heading:
            heading = section
            lines += ["", f"[{section}]  {(inspect.getdoc(field.owner) or '').splitlines()[0]}"]
        value = _value(values, field.path)
        shown = "none" if value is None else str(value)
        if isinstance(value, bool):
            shown = shown.lower()
        elif isinstance(value, str):
            shown = f'"{value}"'
        lines.append(f"  --{field.path} {type_name(field.annotation)} = {shown}")
        comment = comments[field.owner.__name__, field.name]
        lines += textwrap.wrap(comment, 92, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines) + "\n"
