"""Checkpoints: weights, optimiser, random state and source in one folder, committed by one rename.

`checkpoints/step-000050/` holds `weights.safetensors` (trainable tensors), `optimizer.safetensors`,
`source.msgpack` (ledger and prompts, or the dataset's position) and `state.json`. A folder that
lacks `state.json`, or whose name begins with a dot, was never finished and is not looked at.
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
    """What a run needs to go on exactly.

    `state` is JSON: counters, the version, and what the run checks on resume (digests).
    """

    step: int
    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    source: bytes
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, keep: int, also: Collection[int] = ()
) -> Path:
    """Write `checkpoint` under `folder` and delete all but the newest `keep` and those of the
    steps `also` (the best evaluation's).

    Raises CheckpointError, with earlier checkpoints untouched, where the disk does not take it.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        for unfinished in folder.glob(".step-*"):  # a killed writer's; nobody else would delete it
            shutil.rmtree(unfinished, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_tensors(temporary / "weights.safetensors", checkpoint.weights, {"format": "mlx"})
        write_tensors(temporary / "optimizer.safetensors", checkpoint.optimizer, {"format": "mlx"})
        _write(temporary / "source.msgpack", checkpoint.source)
        state = {"step": checkpoint.step, **checkpoint.state}
        _write(temporary / "state.json", msgspec.json.format(msgspec.json.encode(state)))
        replaced = folder / f".{final.name}.replaced"
        if final.exists():  # a folder cannot be replaced; half deleted it would look finished
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        _sync(temporary)
        os.replace(temporary, final)
        _sync(folder)  # before older ones are deleted: a power cut must leave one of them
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SnapshotError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"Cannot write the checkpoint {final}: {error}. Earlier checkpoints are untouched. "
            "Free space, then go on with --run.resume."
        ) from error
    spared = {f"step-{step:06d}" for step in also}
    for old in checkpoints(folder)[:-keep] if keep > 0 else []:
        if old.name not in spared:
            (old / "state.json").unlink(missing_ok=True)  # half deleted it is not finished
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints under `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob("step-*/state.json"))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the newest finished checkpoint under `folder`, or `folder` itself if it is one."""
    found = [folder] if (folder / "state.json").is_file() else checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"There is no finished checkpoint in {folder}. Name a run folder that has one in "
            "run.resume, or leave run.resume out to start anew."
        )
    path = found[-1]
    try:
        state = msgspec.json.decode((path / "state.json").read_bytes(), type=dict[str, Any])
        weights = _tensors(path / "weights.safetensors")
        optimizer = _tensors(path / "optimizer.safetensors")
        source = (path / "source.msgpack").read_bytes()
    except (OSError, SnapshotError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error}. Delete that folder to go on from the "
            "one before it."
        ) from error
    return Checkpoint(int(state["step"]), weights, optimizer, source, state)


def _tensors(path: Path) -> dict[str, mx.array]:
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
