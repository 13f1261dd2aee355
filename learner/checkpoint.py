"""Checkpoints: weights, optimiser, random state and source in one folder, committed by one rename.

`checkpoints/step-000050/` holds `weights.safetensors` (trainable tensors), `optimizer.safetensors`,
`source.msgpack` (ledger and prompts, or the dataset's position) and `state.json`. A folder without
`state.json`, or whose name begins with a dot, is unfinished and is ignored.
"""

import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from protocol.errors import CheckpointError, SnapshotError
from protocol.model.snapshots import read_tensors, write_tensors

log = logging.getLogger("pippin.learner")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue exactly.

    `state` becomes JSON: counters, the random state, and the digests that are checked on resume.
    """

    step: int
    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    source: bytes
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, keep: int, also: Collection[int] = ()
) -> Path:
    """Write a checkpoint under `folder`, then delete old ones; return its folder.

    The newest `keep` stay (0: all), and those of the steps in `also` (the best evaluation's).
    Raises CheckpointError, with earlier checkpoints untouched, if the disk does not take it.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        # Left by a killed writer: nobody else would delete them.
        for unfinished in folder.glob(".step-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        _write_files(temporary, checkpoint)
        _commit(temporary, final)
    except (OSError, SnapshotError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"Cannot write the checkpoint {final}: {error}. Earlier checkpoints are untouched. "
            "Free space, then continue with --run.resume."
        ) from error

    kept = {f"step-{step:06d}" for step in also}
    for old in checkpoints(folder)[:-keep] if keep > 0 else []:
        if old.name not in kept:
            # Without this file, a folder that is half deleted does not count as a checkpoint.
            (old / "state.json").unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints under `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the newest finished checkpoint under `folder`, or `folder` itself if it is one.

    Raises CheckpointError if there is none or if it cannot be read.
    """
    found = [folder] if (folder / "state.json").is_file() else checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"There is no finished checkpoint in {folder}. Name a run folder that has one in "
            "run.resume, or leave run.resume out to start from the beginning."
        )

    path = found[-1]
    try:
        state = msgspec.json.decode((path / "state.json").read_bytes(), type=dict[str, Any])
        weights = _read_tensors(path / "weights.safetensors")
        optimizer = _read_tensors(path / "optimizer.safetensors")
        source = (path / "source.msgpack").read_bytes()
    except (OSError, SnapshotError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error}. Delete that folder to continue from "
            "the checkpoint before it."
        ) from error
    return Checkpoint(int(state["step"]), weights, optimizer, source, state)


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir(parents=True)
    write_tensors(folder / "weights.safetensors", checkpoint.weights, {"format": "mlx"})
    write_tensors(folder / "optimizer.safetensors", checkpoint.optimizer, {"format": "mlx"})
    _write(folder / "source.msgpack", checkpoint.source)

    state = {"step": checkpoint.step, **checkpoint.state}
    _write(folder / "state.json", msgspec.json.format(msgspec.json.encode(state)))


def _commit(temporary: Path, final: Path) -> None:
    """Give a complete folder its final name, replacing an earlier one of that name."""
    # A folder cannot be replaced in one step, and one that is half deleted would look finished.
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)

    _sync(temporary)
    os.replace(temporary, final)
    # Before older checkpoints are deleted: a power cut must leave at least one.
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _read_tensors(path: Path) -> dict[str, mx.array]:
    return read_tensors(path.read_bytes(), str(path))[0]


def _sync(folder: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
