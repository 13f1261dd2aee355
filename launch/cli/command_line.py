"""Reads a program's command line: recipe and flags become settings and a run folder.

The resolved config.toml holds absolute paths (`launch/run_folder/paths.py`). Nothing heavy is
imported before the configuration is accepted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

from launch.processes.placement import require_gpus
from launch.processes.run_lock import hold_run_folder
from launch.run_folder.create import CONFIG, make_run_folder
from launch.run_folder.paths import DATA_SUFFIXES, require_files, resolve_flags, resolve_paths
from launch.run_folder.resume import changed_settings, prepare_resume, require_program
from protocol.config.load import load
from protocol.config.reference import help_text
from protocol.config.settings import PROGRAMS, AnyRun
from protocol.errors import ConfigError
from protocol.run_record import Program

RunT = TypeVar("RunT", bound=AnyRun)


def read_command_line(
    cls: type[RunT],
    argv: Sequence[str],
    usage: str,
    default: Path | None = None,
    *,
    also_accepts: type[AnyRun] | None = None,
) -> tuple[RunT, Path]:
    """Return the settings and the run folder, which then holds config.toml and run.json.

    `argv` is `[recipe.toml] [--section.key value …]`; without a recipe, `default` is used.
    `also_accepts` is as for `load`. Prints the help and exits on --help or -h. Raises ConfigError.
    """
    flags = list(argv)
    if "--help" in flags or "-h" in flags:
        sys.stdout.write(help_text(cls, usage))
        raise SystemExit(0)

    recipe = Path(flags.pop(0)) if flags and not flags[0].startswith("--") else None
    if recipe is not None and recipe.suffix.lower() in DATA_SUFFIXES:
        raise ConfigError(
            f"{recipe} is not a recipe (a TOML file); give data as --data.path {recipe}"
        )

    flags = resolve_flags(flags, Path.cwd())
    resumed = _resumed_folder(flags)
    if resumed is None:
        return _new_run(cls, recipe or default, flags, also_accepts)
    if recipe is not None:
        raise ConfigError(f"give either a recipe ({recipe}) or --run.resume, not both")
    return _resume_run(cls, resumed, flags), resumed


def program_of(cls: type[AnyRun]) -> Program:
    """Return the name of the program whose recipes are a `cls`."""
    return cast("Program", Path(PROGRAMS[cls]).stem)


def _new_run(
    cls: type[RunT],
    recipe: Path | None,
    flags: Sequence[str],
    also_accepts: type[AnyRun] | None,
) -> tuple[RunT, Path]:
    run = load(cls, recipe, flags, also_accepts=also_accepts)
    if recipe is not None:
        run = resolve_paths(run, recipe.parent.absolute())
    # Before the folder is made and a model is loaded for it.
    require_files(run)
    require_gpus(run)
    return run, make_run_folder(run, program_of(cls), recipe.stem if recipe else "run")


def _resume_run(cls: type[RunT], folder: Path, flags: Sequence[str]) -> RunT:
    """Return the settings of the run in `folder`, with the changes of `flags`."""
    require_program(folder, program_of(cls))
    before = load(cls, folder / CONFIG)
    run = load(cls, folder / CONFIG, [*flags, f"--run.resume={folder}"])
    run = resolve_paths(run, Path.cwd())
    require_gpus(run)
    try:
        with hold_run_folder(folder):  # refused before anything is written
            prepare_resume(folder, run)
    except OSError as error:
        raise ConfigError(f"--run.resume {folder}: cannot be written: {error}") from error

    sys.stdout.write("".join(f"{line}\n" for line in changed_settings(before, run)))
    return run


def _resumed_folder(flags: Sequence[str]) -> Path | None:
    """Return the folder that `--run.resume` names; `flags` are `--key=value`."""
    for flag in flags:
        name, _, text = flag.partition("=")
        if name == "--run.resume":
            folder = Path(text).resolve()
            if not (folder / CONFIG).is_file():
                raise ConfigError(f"--run.resume {text}: required a run folder with {CONFIG}")
            return folder
    return None
