"""Why a program does not take a key, and what to write instead."""

import difflib
from collections.abc import Iterable

from protocol.config.fields import leaf_fields
from protocol.config.settings import PROGRAMS, AnyRun

# Old key: new key.
RENAMED = {"actors.max_rows": "actors.max_concurrent_completions"}

# A key that only other programs read, and what does the same in programs that do not.
INSTEAD = {
    "run.log_completions": ("eval.generate", "writes answers"),
    "data.max_prompt_length": ("data.max_length", "counts the prompt"),
    "data.max_length": ("data.max_prompt_length", "limits the prompt"),
    "data.overlong_prompts": ("data.truncation_mode", "says which end is kept"),
    "eval.batch_size": ("actors.max_concurrent_completions", "limits what is sampled at once"),
    "eval.generate": ("eval.steps", "always samples answers"),
}


def unknown_key(cls: type[AnyRun], path: str, *, flag: bool) -> str:
    """Return the message for a key of a file or a flag that the program of `cls` lacks."""
    keys = leaf_fields(cls)
    if path in RENAMED:
        dashes = "--" if flag else ""
        return f"{dashes}{path} is now {dashes}{RENAMED[path]}"
    shown = f"--{path}" if flag else repr(path)

    readers = [name for other, name in PROGRAMS.items() if path in leaf_fields(other)]
    if readers:
        verb = "read" if len(readers) > 1 else "reads"
        key, use = INSTEAD.get(path, ("", ""))
        advice = f"here {key} {use}" if key in keys else "leave it out"
        return f"unknown key {shown}: {' and '.join(readers)} {verb} it; {advice}"

    if flag:
        return f"unknown key {shown}{nearest(path, keys) or '; --help lists every key'}"

    section, dot, _ = path.rpartition(".")
    valid = [key for key in keys if key.startswith(f"{section}.")] or cls.__struct_fields__
    hint = nearest(path, keys if dot else valid) or f"; valid here: {', '.join(valid)}"
    return f"unknown {'key' if dot else 'section'} {shown}{hint}"


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
