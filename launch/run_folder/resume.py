"""The settings of a resumed run: changed by the command line, restored if they are refused."""

from pathlib import Path
from typing import Any

import msgspec

from launch.run_folder.create import CONFIG, installed_versions
from protocol.config.load import to_toml
from protocol.config.settings import AnyRun, builtins
from protocol.errors import ConfigError
from protocol.run_record import (
    EVENTS,
    RUN,
    Program,
    StateChanged,
    change_state,
    cut_partial_line,
    read_run,
    record_event,
    replace_file,
)

PREVIOUS = ".config-before.toml"
PREVIOUS_RUN = ".run-before.json"


def require_program(folder: Path, program: Program) -> None:
    """Raise ConfigError if another program made the run in `folder`."""
    made_by = read_run(folder).program
    if made_by != program:
        raise ConfigError(
            f"--run.resume {folder}: a run of launch/{made_by}.py; resume it with that program"
        )


def changed_settings(before: AnyRun, after: AnyRun) -> list[str]:
    """Return a line for each setting that differs, except `run.resume` itself."""
    old, new = builtins(before), builtins(after)
    return [
        f"changed: {section}.{key} = {_text(new[section][key])}, was {_text(value)}"
        for section, values in old.items()
        for key, value in values.items()
        if new[section][key] != value and (section, key) != ("run", "resume")
    ]


def _text(value: Any) -> str:  # noqa: ANN401 - any setting
    return msgspec.json.encode(value).decode()


def prepare_resume(folder: Path, run: AnyRun) -> None:
    """Make `run` the folder's settings, keep the previous ones aside, and open its records again.

    Raises OSError where the folder cannot be written.
    """
    (folder / PREVIOUS_RUN).write_bytes((folder / RUN).read_bytes())
    (folder / PREVIOUS).write_bytes((folder / CONFIG).read_bytes())
    replace_file(folder / CONFIG, to_toml(run).encode())

    # Nobody else appends yet, so that a killed writer's last line can be cut off safely.
    cut_partial_line(folder / EVENTS)
    # The learner says again how many steps there are: the settings may have changed.
    change_state(folder, "starting", total_steps=None, versions=installed_versions())


def accept_settings(folder: Path) -> None:
    """Forget the previous settings: the learner could use the new ones."""
    (folder / PREVIOUS).unlink(missing_ok=True)
    (folder / PREVIOUS_RUN).unlink(missing_ok=True)


def restore_settings(folder: Path) -> bool:
    """Put the previous settings back, unless the learner accepted the new ones.

    Returns whether it did: the run is then what it was before, finished for example.
    """
    if not (folder / PREVIOUS).exists():
        return False
    (folder / PREVIOUS).replace(folder / CONFIG)
    (folder / PREVIOUS_RUN).replace(folder / RUN)
    record_event(folder, StateChanged(state=read_run(folder).state))
    return True
