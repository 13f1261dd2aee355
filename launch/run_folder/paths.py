"""The paths that a recipe and its flags hold: where they are looked for, and made absolute.

Relative paths of a recipe file (model, data, prepare, rewards…) are taken from the recipe's folder
where they exist there, otherwise from the current folder, as those of flags are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from msgspec import structs

from protocol.config.load import split_flags
from protocol.config.settings import GrpoRun, PreferenceRun, SftRun
from protocol.errors import ConfigError

RunT = TypeVar("RunT", GrpoRun, PreferenceRun, SftRun)
PATHS = (
    "model.path",
    "model.adapter_path",
    "model.chat_template",
    "model.reference",
    "data.path",
    "data.eval_path",
    "data.prepare",
    "rewards.functions",
    "transport.keys",
)
DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")


def require_file(key: str, text: str) -> None:
    """Refuse a data file that is not there, before a model is loaded for it."""
    file = Path(text).expanduser()
    named = file.suffix.lower() in DATA_SUFFIXES and not any(mark in text for mark in "*[:")
    if named and not file.exists():
        raise ConfigError(f"{key} {text}: no such file (looked at {file.absolute()})")


def resolve_flags(flags: Sequence[str], base: Path) -> list[str]:
    """Return flags as `--key=value`, with the paths that exist under `base` made absolute."""
    resolved: list[str] = []
    for key, text in split_flags(flags):
        value = text
        if key == "rewards.functions" and not text.lstrip().startswith("["):
            value = ",".join(resolve_path(part.strip(), base) for part in text.split(","))
        elif key in PATHS and not (key == "model.reference" and text in ("initial", "base")):
            value = resolve_path(text, base)
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


def resolve_paths(run: RunT, base: Path) -> RunT:
    """Return the run with the paths of its recipe made absolute."""
    model = run.model
    reference = model.reference
    if reference not in ("initial", "base"):
        reference = resolve_path(reference, base)
    model = structs.replace(
        model,
        path=resolve_path(model.path, base),
        adapter_path=resolve_path(model.adapter_path, base),
        chat_template=resolve_path(model.chat_template, base),
        reference=reference,
    )
    data = structs.replace(
        run.data,
        path=resolve_path(run.data.path, base),
        eval_path=resolve_path(run.data.eval_path, base),
        prepare=resolve_path(run.data.prepare, base),
    )
    run = structs.replace(run, model=model, data=data)
    if isinstance(run, GrpoRun):
        functions = [resolve_path(name, base) for name in run.rewards.functions]
        keys = resolve_path(run.transport.keys, base)
        return structs.replace(
            run,
            rewards=structs.replace(run.rewards, functions=functions),
            transport=structs.replace(run.transport, keys=keys),
        )
    return run
