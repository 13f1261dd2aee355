"""Checkpoints: weights, optimiser, random state and source in one folder, committed by one rename.

`checkpoints/step-000050/` holds `weights.safetensors` (trainable tensors), `optimizer.safetensors`,
`source.msgpack` (ledger and prompts, or the dataset's position) and `state.json`, which has a
SHA-256 of each of the others and of its own content, so that damage is noticed before anything is
used. A folder without `state.json`, or whose name begins with a dot, is unfinished and is ignored.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from protocol.errors import CheckpointError, SnapshotError
from protocol.model.snapshots import read_tensors, write_tensors
from protocol.run_record import sync_folder

WEIGHTS, OPTIMIZER, SOURCE = "weights.safetensors", "optimizer.safetensors", "source.msgpack"
STATE = "state.json"
log = logging.getLogger("pippin.learner")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue exactly.

    `state` becomes JSON: counters, the random state, and the digests that are checked on resume.
    `path` is the folder that it was read from.
    """

    step: int
    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    source: bytes
    state: dict[str, Any]
    path: Path | None = None


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, keep: int, also: Collection[int] = ()
) -> Path:
    """Write a checkpoint under `folder`, then delete old ones; return its folder.

    The newest `keep` up to this step stay (0: all), and those of the steps in `also` (the best
    evaluation's). Raises CheckpointError, with earlier checkpoints untouched, if the disk does not
    take it.
    """
    final = checkpoint_path(folder, checkpoint.step)
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        remove_unfinished(folder)
        _write_files(temporary, checkpoint)
        _commit(temporary, final)
    except (OSError, SnapshotError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"Cannot write the checkpoint {final}: {str(error).rstrip('.')}. "
            "Earlier checkpoints are untouched. Free space, then continue with --run.resume."
        ) from error

    # Later ones were left by a resume from before them: newer names, but older than this one.
    past = [path for path in checkpoints(folder) if step_of(path) <= checkpoint.step]
    for old in past[:-keep] if keep > 0 else []:
        if step_of(old) not in also:
            # Without this file, a folder that is half deleted does not count as a checkpoint.
            (old / STATE).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, among those under `folder`."""
    return folder / f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints under `folder`, damaged or not, oldest first."""
    found = [path.parent for path in folder.glob(f"step-*/{STATE}")]
    return sorted((path for path in found if step_of(path) >= 0), key=step_of)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed writers left under `folder`; nobody may be writing there.

    A checkpoint that was moved away for a replacement which never came gets its name back.
    """
    for replaced in folder.glob(".step-*.replaced"):
        final = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not final.exists() and (replaced / STATE).is_file():
            os.replace(replaced, final)

    named = [path for path in folder.glob("step-*/") if step_of(path) >= 0]
    half_deleted = [path for path in named if not (path / STATE).is_file()]
    for unfinished in [*folder.glob(".step-*"), *half_deleted]:
        log.info("deleting the unfinished checkpoint %s", unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the newest intact checkpoint under `folder`, or `folder` itself if it is one.

    Damaged ones are named in warnings. Raises CheckpointError if none is intact.
    """
    found = [folder] if (folder / STATE).is_file() else checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"There is no finished checkpoint in {folder}. Name a run folder that has one in "
            "run.resume, or leave run.resume out to start from the beginning."
        )

    faults: list[str] = []
    for path in reversed(found):
        try:
            checkpoint = _read(path)
        except CheckpointError as error:
            faults.append(str(error))
            log.warning("passing over a damaged checkpoint: %s", error)
            continue
        if faults:
            log.warning("continuing from the checkpoint before it: %s", path)
        return checkpoint

    raise CheckpointError(
        f"There is no intact checkpoint in {folder}: {'; '.join(faults)}. Put back a copy of one, "
        "or start from the beginning in another folder: leave run.resume out and choose another "
        "run.name."
    )


@contextmanager
def restoring(checkpoint: Checkpoint) -> Generator[bytes]:
    """Give the source's bytes to be decoded; CheckpointError, with their file, if they cannot be.

    Damage is found when a checkpoint is read, so these bytes are what some learner wrote.
    """
    try:
        yield checkpoint.source
    except msgspec.MsgspecError as error:
        where = checkpoint.path / SOURCE if checkpoint.path else SOURCE
        raise CheckpointError(
            f"{where}: not what this program writes there ({error}). Resume with the program and "
            "the version of Pippin that made the run, or start a new one."
        ) from error


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint whose files match their digests; CheckpointError names one that does not.

    Those of versions of Pippin that wrote no digests are refused too.
    """
    state = _read_state(path / STATE)
    digests = state.pop("files")
    data = {name: _read_bytes(path / name) for name in (WEIGHTS, OPTIMIZER, SOURCE)}
    for name, content in data.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != digests.get(name):
            raise CheckpointError(
                f"{path / name}: {len(content):,} bytes with SHA-256 {digest[:12]}, required "
                f"{str(digests.get(name))[:12]}"
            )

    try:
        weights, optimizer = (
            read_tensors(data.pop(name), str(path / name))[0] for name in (WEIGHTS, OPTIMIZER)
        )
    except SnapshotError as error:
        raise CheckpointError(str(error)) from error
    return Checkpoint(int(state["step"]), weights, optimizer, data[SOURCE], state, path)


def _read_state(path: Path) -> dict[str, Any]:
    """Read a `state.json` that matches its own digest, which is left out of the result."""
    content = _read_bytes(path)
    try:
        state = msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise CheckpointError(
            f"{path}: {len(content):,} bytes, not a JSON object: {error}"
        ) from error

    digest = state.pop("digest", None)
    if digest is None or not isinstance(state.get("files"), dict):
        raise CheckpointError(
            f"{path}: it has no digests, as those of earlier versions of Pippin, which cannot be "
            "checked for damage"
        )
    if digest != _state_digest(state):
        raise CheckpointError(
            f"{path}: its content has SHA-256 {_state_digest(state)[:12]}, required "
            f"{str(digest)[:12]}: it was edited or damaged"
        )
    return state


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _state_digest(state: dict[str, Any]) -> str:
    """Return the SHA-256 of a state's content, however it is laid out."""
    return hashlib.sha256(msgspec.json.encode(state, order="sorted")).hexdigest()


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after; -1 for other names."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir(parents=True)
    digests = {SOURCE: hashlib.sha256(checkpoint.source).hexdigest()}
    for name, arrays in ((WEIGHTS, checkpoint.weights), (OPTIMIZER, checkpoint.optimizer)):
        digest = hashlib.sha256()
        write_tensors(folder / name, arrays, {"format": "mlx"}, digest.update)
        digests[name] = digest.hexdigest()
    _write(folder / SOURCE, checkpoint.source)

    state = {"step": checkpoint.step, **checkpoint.state, "files": digests}
    state["digest"] = _state_digest(state)
    _write(folder / STATE, msgspec.json.format(msgspec.json.encode(state)))


def _commit(temporary: Path, final: Path) -> None:
    """Give a complete folder its final name, replacing an earlier one of that name."""
    # A folder cannot be replaced in one step, and one that is half deleted would look finished.
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)

    sync_folder(temporary)
    os.replace(temporary, final)
    # Before older checkpoints are deleted: a power cut must leave at least one.
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
