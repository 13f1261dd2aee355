"""Makes the folder of a new run."""

import importlib.metadata
import os
import time
from contextlib import suppress
from pathlib import Path

from protocol.config.load import to_toml
from protocol.config.settings import AnyRun
from protocol.errors import ConfigError
from protocol.run_record import EVENTS, RUN, Program, RunRecord, read_run, write_run

CONFIG = "config.toml"
DISTRIBUTIONS = ("mlx", "mlx-lm", "pippin")


def make_run_folder(run: AnyRun, program: Program, stem: str) -> Path:
    """Make `runs/<name>/` with config.toml and run.json, and point `runs/latest` to it.

    A run without a name takes `stem`, the time and the process id. Raises ConfigError if the folder
    already holds a run, or cannot be made.
    """
    name = run.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(run.run.dir).absolute() / name
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        _clear_failed_start(folder)
        try:
            # "x": of two launches with the same name at the same time, only one gets the folder.
            with (folder / CONFIG).open("x", encoding="utf-8") as file:
                file.write(to_toml(run))
        except FileExistsError:
            raise _occupied(folder) from None
        write_run(folder, RunRecord(program=program, versions=installed_versions()))
        _point_latest_to(folder)
    except OSError as error:
        raise ConfigError(f"run.dir: the run folder {folder} cannot be made: {error}") from error
    return folder


def installed_versions() -> dict[str, str]:
    """Return the versions of what computes a run, without importing any of it."""
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _clear_failed_start(folder: Path) -> None:
    """Free the name of a run that failed before its first step."""
    if (folder / RUN).exists() and read_run(folder).state == "failed_to_start":
        for name in (CONFIG, RUN, EVENTS):
            (folder / name).unlink(missing_ok=True)


def _occupied(folder: Path) -> ConfigError:
    saved = any((folder / "checkpoints").glob("step-*/state.json"))
    remedy = f"continue it with --run.resume {folder}" if saved else "delete that folder"
    return ConfigError(f"run.name: {folder} already holds a run; choose another name, or {remedy}")


def _point_latest_to(folder: Path) -> None:
    temporary = folder.parent / f".latest-{os.getpid()}"
    temporary.symlink_to(folder.name)
    temporary.replace(folder.parent / "latest")
