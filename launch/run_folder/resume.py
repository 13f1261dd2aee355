"""A resumed run's settings: what the command line changes, and back again where it is refused."""

import os
from pathlib import Path
from typing import Any

import msgspec

from protocol.config.load import to_toml
from protocol.config.settings import AnyRun, builtins

CONFIG, BEFORE = "config.toml", ".config-before.toml"


def changes(before: AnyRun, after: AnyRun) -> list[str]:
    """Return a line for each setting that differs, other than where the run goes on from."""
    old, new = builtins(before), builtins(after)
    return [
        f"changed: {section}.{key} = {_text(new[section][key])}, was {_text(value)}"
        for section, values in old.items()
        for key, value in values.items()
        if new[section][key] != value and (section, key) != ("run", "resume")
    ]


def _text(value: Any) -> str:  # noqa: ANN401 - any setting
    return msgspec.json.encode(value).decode()


def put(folder: Path, run: AnyRun) -> None:
    """Write `run` as the folder's settings, and keep those before it until `settle`."""
    (folder / BEFORE).write_bytes((folder / CONFIG).read_bytes())
    fresh = folder / f".config-{os.getpid()}.toml"
    fresh.write_text(to_toml(run), encoding="utf-8")
    fresh.replace(folder / CONFIG)


def settle(folder: Path, *, begun: bool) -> None:
    """Forget the settings before, or put them back.

    The learner forgets them once it accepts the new ones; the launcher puts back what is left.
    """
    before = folder / BEFORE
    if before.exists():
        before.unlink() if begun else before.replace(folder / CONFIG)
