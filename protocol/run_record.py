"""What a run records about itself: `run.json` (what it is) and `events.jsonl` (what happened).

The learner and the launcher write these files; the display, the report, the comparison and a resume
read them, and never the text of a log. `run.json` is replaced whole, and only one process at a time
does so: the launcher before and after the learner's life, the learner during it. Both append to
`events.jsonl`, one whole line per event, and a resumed run adds to what is there.
"""

import errno
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from protocol.errors import ConfigError

Program = Literal["grpo", "preference", "sft", "pairs"]
State = Literal[
    "starting",  # the learner has not accepted its settings yet
    "running",
    "stopping",  # on request, after the step under way
    "stopped",
    "finished",
    "failed",
    "failed_to_start",  # before the first step: nothing was recorded, and the folder may be reused
]

RUN, EVENTS = "run.json", "events.jsonl"
BLOCK = 1 << 16  # bytes; files of long runs are not read whole
EVENT_LOGGER = "pippin.events"
T = TypeVar("T")
log = logging.getLogger(EVENT_LOGGER)


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `run.json`."""

    program: Program
    state: State = "starting"
    started_at: float | None = None  # Unix s; when the learner first was ready to train
    total_steps: int | None = None  # None until the learner knows
    versions: dict[str, str] = {}  # of mlx, mlx-lm and pippin


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=True):
    """Base of every event: a line of `events.jsonl`, tagged with its class's name."""

    time: float = msgspec.field(default_factory=time.time)  # Unix s

    @property
    def text(self) -> str:
        """Return the event in words, for logs and people."""
        raise NotImplementedError


class StateChanged(Event, frozen=True, kw_only=True):
    """The run's state changed to `state`, as `run.json` says too."""

    state: State

    @property
    def text(self) -> str:
        return f"the run is {self.state.replace('_', ' ')}"


class EvaluationStarted(Event, frozen=True, kw_only=True):
    """The evaluation of the policy of `step` began."""

    step: int

    @property
    def text(self) -> str:
        return f"evaluating step {self.step}"


class EvaluationFinished(Event, frozen=True, kw_only=True):
    """The figures of the policy of `step` are complete; their line in `metrics.jsonl` follows."""

    step: int

    @property
    def text(self) -> str:
        return f"evaluated step {self.step}"


class CheckpointSaved(Event, frozen=True, kw_only=True):
    """A checkpoint was written to `path`, relative to the run folder; `again`: the last was not."""

    step: int
    path: str
    again: bool = False

    @property
    def text(self) -> str:
        return f"{'saving works again: ' if self.again else ''}saved {self.path}"


class CheckpointFailed(Event, frozen=True, kw_only=True):
    """A checkpoint could not be written, and training went on without it."""

    step: int
    reason: str

    @property
    def text(self) -> str:
        return f"step {self.step}: training goes on without this checkpoint: {self.reason}"


class WorkDone(Event, frozen=True, kw_only=True):
    """The learner has done its work, or stops on request; actors are told to leave after this."""

    @property
    def text(self) -> str:
        return "the work is done"


class Fault(Event, frozen=True, kw_only=True):
    """A process failed; written by the process itself, or by the launcher for it.

    A `Restart` of the same process follows, or it failed for good.
    """

    process: str
    reason: str

    @property
    def text(self) -> str:
        return f"{self.process}: {self.reason}"


class Restart(Event, frozen=True, kw_only=True):
    """A process died, and is restarted after `delay_s`.

    `attempt` counts the restarts that limit it, from 1 to `max_restarts`.
    """

    process: str
    reason: str
    attempt: int
    max_restarts: int
    delay_s: float

    @property
    def text(self) -> str:
        return (
            f"{self.process} ended with {self.reason}; restart {self.attempt} of "
            f"{self.max_restarts} in {self.delay_s:g} s"
        )


class StartUp(Event, frozen=True, kw_only=True):
    """A process came to its first result, the last of `parts`: seconds of each stage, in order."""

    process: str
    parts: dict[str, float]

    @property
    def text(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        total, result = sum(self.parts.values()), next(reversed(self.parts), "start")
        return f"{self.process}: {result} after {total:.1f} s ({parts})"


class Notice(Event, frozen=True, kw_only=True):
    """A message of the learner to the user."""

    level: Literal["info", "warning"]
    message: str

    @property
    def text(self) -> str:
        return self.message


AnyEvent = (
    StateChanged
    | EvaluationStarted
    | EvaluationFinished
    | CheckpointSaved
    | CheckpointFailed
    | WorkDone
    | Fault
    | Restart
    | StartUp
    | Notice
)
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def read_run(folder: Path) -> RunRecord:
    """Read `run.json`; ConfigError where `folder` has none, or one that cannot be read."""
    path = folder / RUN
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunRecord)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder}: required a run folder with {RUN}; found none") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{path} is damaged: {error}. Put back a copy; without one, write "
            '{"program": "grpo"} into it, with the program that made the run.'
        ) from error


def write_run(folder: Path, record: RunRecord) -> None:
    """Replace `run.json`."""
    replace_file(folder / RUN, msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file; a reader sees the old contents or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut could leave the name on an empty file
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def change_state(folder: Path, state: State, **changes: Any) -> None:  # noqa: ANN401
    """Note a new state in `run.json` and as an event; `changes` are other fields of `RunRecord`."""
    write_run(folder, msgspec.structs.replace(read_run(folder), state=state, **changes))
    record_event(folder, StateChanged(state=state))


def record_event(folder: Path, event: AnyEvent, before: Sequence[AnyEvent] = ()) -> bool:
    """Append an event to `events.jsonl`, and log it; return whether it was written.

    A full disk does not end the run: the event is then only logged. `before` are earlier events
    that it refused.
    """
    written = True
    try:
        append_events(folder, [*before, event])
    except OSError as error:
        log.info("%s cannot be written: %s", folder / EVENTS, error)
        written = False

    level = logging.WARNING if isinstance(event, CheckpointFailed) else logging.INFO
    log.log(level, "%s", event.text)
    return written


def append_events(folder: Path, events: Sequence[AnyEvent]) -> None:
    """Append whole lines to `events.jsonl`, all or none; another process may append to it as well.

    Raises OSError where the disk does not take them.
    """
    data = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
    with (folder / EVENTS).open("ab", buffering=0) as file:  # unbuffered: one write
        written = file.write(data)
        if written != len(data):
            size = os.fstat(file.fileno()).st_size
            if file.tell() == size:  # nobody has appended since
                file.truncate(size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def parse_events(data: bytes) -> list[AnyEvent]:
    """Decode lines of `events.jsonl`; lines that are damaged or of an unknown kind are left out."""
    return decode_lines(data, _decoder)


def decode_lines(data: bytes, decoder: msgspec.json.Decoder[T]) -> list[T]:
    """Decode each line; those that the decoder refuses are left out."""
    found: list[T] = []
    for line in data.splitlines():
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError:
            continue
    return found


def cut_partial_line(path: Path) -> None:
    """Cut off a last line that a killed writer left unfinished: the next would be glued to it."""
    if not path.is_file():
        return

    with path.open("r+b") as file:
        size = whole = file.seek(0, os.SEEK_END)
        newline = -1
        while newline < 0 and whole > 0:
            start = max(0, whole - BLOCK)
            file.seek(start)
            newline = file.read(whole - start).rfind(b"\n")
            whole = start + newline + 1
        if whole != size:
            file.truncate(whole)
