"""Figures of the source's shape: `python -m tests.acceptance.code_figures [ROOT]`.

Files and their lengths, functions, blank lines and comments, `Any`s and casts of the four packages,
entries per folder. The blank lines are those inside functions of 20 lines and more, docstrings left
out; the comment share is that of lines which hold a comment alone.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("protocol", "actors", "learner", "launch")
LONG = 20  # lines from which on a function should show its stages
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    """Yield every function of a module, inner ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(function: Function) -> int:
    """Return the lines of a function without its decorators."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def blank_lines(function: Function, lines: list[str]) -> int:
    """Count the blank lines of a function's body after its docstring."""
    body = function.body
    documented = ast.get_docstring(function) is not None
    start = (body[0].end_lineno or body[0].lineno) if documented else body[0].lineno
    return sum(not line.strip() for line in lines[start : function.end_lineno])


def main(root: Path) -> None:
    """Print the figures of the packages under `root`."""
    paths = [path for name in PACKAGES for path in sorted((root / name).rglob("*.py"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    sizes = {path: text.count("\n") for path, text in texts.items()}
    found = [(path, f) for path, text in texts.items() for f in functions(ast.parse(text))]
    long = [(path, f) for path, f in found if length(f) >= LONG]
    blank = [blank_lines(f, texts[path].splitlines()) for path, f in long]
    tokens = [
        token
        for text in texts.values()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    ]
    comments = sum(t.type == tokenize.COMMENT and t.line.strip().startswith("#") for t in tokens)
    names = [t.string for t in tokens if t.type == tokenize.NAME]

    filled = [size for size in sizes.values() if size]
    largest = max(sizes, key=lambda path: sizes[path])
    path, function = max(found, key=lambda item: length(item[1]))
    print(f"files {len(filled)}, lines {sum(filled)}, median {statistics.median(filled):g}")
    print(f"largest file {largest.relative_to(root)} {sizes[largest]}")
    print(f"largest function {function.name} {length(function)} ({path.relative_to(root)})")
    print(f"blank lines per function of {LONG} lines and more: {statistics.fmean(blank):.2f}")
    print(f"comment lines {comments / sum(filled):.1%}, Any {names.count('Any')}, "
          f"cast {names.count('cast')}")  # fmt: skip
    for folder in sorted({path.parent for path in paths}):
        entries = [p for p in folder.iterdir() if p.name not in ("__pycache__", "__init__.py")]
        print(f"{folder.relative_to(root)}/ {len(entries)} entries")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
