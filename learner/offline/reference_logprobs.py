"""Reference log-probs for preference training, computed before the first step and stored.

As with TRL's `precompute_ref_log_probs`, the reference passes over all examples once, and the steps
need no reference. Results are stored beside the caches of `datasets` ($HF_DATASETS_CACHE, by
default ~/.cache/huggingface/datasets), in the folder `pippin`. A file's name is a digest of the
token batches that the reference saw and of everything else that decides the numbers: runs with
another order or seed find it if their micro-batches are the same, and stale files are never found.

An example is computed in its micro-batch of the first epoch. With micro-batches of one example, or
in sequential order, every epoch has the same ones, and the numbers are bit for bit those that the
step would compute; otherwise later epochs pad examples differently, and numbers differ by rounding.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from learner.data.examples import Logprobs
from learner.model.batches import TokenBatch, to_device
from learner.model.logprobs import Head
from learner.model.reference import Reference
from learner.objectives.base import ReferenceLayout, frozen_logprobs
from protocol.errors import SnapshotError
from protocol.model.snapshots import named_arrays, read_tensors, write_tensors

log = logging.getLogger("pippin.learner")

LAYOUT = 1  # of the file; increase it with any change that makes older files unusable
_REPORT_S = 10.0

Batch: TypeAlias = Sequence[Any]  # of examples
Sizes: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scorer:
    """Computes reference log-probs: the reference, and the settings that decide its numbers."""

    reference: Reference
    head: Head
    layout: ReferenceLayout[Any]

    def inputs(self, batches: Sequence[Batch]) -> Iterator[TokenBatch]:
        """Yield the token batches of all batches, in order."""
        for batch in batches:
            yield from self.layout.reference_inputs(batch)

    def score(self, tokens: TokenBatch) -> Logprobs:
        """Return the completions' log-probs (tokens,) float32, one after the other, no padding."""
        logprobs = frozen_logprobs(self.reference.model, to_device(tokens), self.head)
        return cast("Logprobs", np.array(logprobs)[tokens.mask > 0])

    def fingerprint(self) -> str:
        """Describe everything but the tokens that can change a bit of the numbers."""
        arrays = named_arrays(self.reference.model.parameters())
        types = sorted({str(array.dtype) for array in arrays.values()})
        device = f"{mx.default_device()} {platform.machine()}"
        packages = [f"{name} {version(name)}" for name in ("mlx", "mlx-lm")]

        return "\n".join(
            [f"layout {LAYOUT}", self.reference.digest, self.head, device, *types, *packages]
        )


def cache_folder() -> Path:
    """Return the folder of precomputed log-probs, beside what `datasets` caches."""
    from datasets import config  # takes seconds to import

    return Path(config.HF_DATASETS_CACHE) / "pippin"


def precompute(
    batches: Sequence[Batch],
    scorer: Scorer,
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[Any]] | None:
    """Return the batches with reference log-probs in their examples; None if `stopped`.

    They are read from `folder` if it has them, else computed and, if the disk has room, stored
    there. A damaged file counts as absent. `stopped` is called before every micro-batch; once it
    returns True, nothing is stored.
    """
    began = time.monotonic()
    digests, sizes = _digests_and_sizes(scorer.inputs(batches))

    # The file holds the token batches in the order of their digests, not in this run's order.
    order = sorted(range(len(digests)), key=digests.__getitem__)
    starts = np.zeros(len(sizes), np.int64)
    starts[order] = np.cumsum([0, *(sizes[index].sum() for index in order)])[:-1]
    total = int(sum(size.sum() for size in sizes))
    digest = hashlib.sha256(scorer.fingerprint().encode())
    for index in order:
        digest.update(digests[index])
    path = folder / f"ref-logps-{digest.hexdigest()[:32]}.safetensors"

    flat = _read(path, total)
    count = sum(len(size) for size in sizes)
    if flat is not None:
        log.info("reference log-probs of %d completions: read from %s", count, path)
    else:
        flat = _compute(batches, scorer, starts, total, stopped)
        if flat is None:
            return None
        took = time.monotonic() - began
        log.info("reference log-probs of %d completions: computed in %.1f s", count, took)
        _write(path, flat)

    parts = _split(flat, starts, sizes)
    return [scorer.layout.with_reference(batch, parts) for batch in batches]


def _digests_and_sizes(inputs: Iterator[TokenBatch]) -> tuple[list[bytes], list[Sizes]]:
    """Return the digest of each token batch, and its completions' lengths (B,) in tokens."""
    digests: list[bytes] = []
    sizes: list[Sizes] = []
    for tokens in inputs:
        digest = hashlib.sha256(repr((tokens.input_ids.shape, tokens.targets.shape)).encode())
        for array in (tokens.input_ids, tokens.positions, tokens.targets, tokens.mask):
            digest.update(array.tobytes())
        digests.append(digest.digest())

        sizes.append(tokens.mask.sum(axis=1).astype(np.int64))
    return digests, sizes


def _compute(
    batches: Sequence[Batch],
    scorer: Scorer,
    starts: Sizes,
    total: int,
    stopped: Callable[[], bool],
) -> Logprobs | None:
    """Return the log-probs (total,) of all token batches, each at its start; None: stopped."""
    flat = np.empty(total, np.float32)
    reported = time.monotonic()

    for index, tokens in enumerate(scorer.inputs(batches)):
        if stopped():
            log.info(
                "reference log-probs: stopped after %d of %d micro-batches; they are not "
                "stored, so a resumed run computes them again",
                index,
                len(starts),
            )
            return None

        logprobs = scorer.score(tokens)
        flat[starts[index] : starts[index] + len(logprobs)] = logprobs
        if time.monotonic() - reported > _REPORT_S:
            reported = time.monotonic()
            log.info("reference log-probs: %d of %d micro-batches", index + 1, len(starts))
    return flat


def _split(flat: Logprobs, starts: Sizes, sizes: list[Sizes]) -> Iterator[list[Logprobs]]:
    """Yield the log-probs of each token batch, per completion, as views of `flat`."""
    for start, size in zip(starts, sizes, strict=True):
        ends = start + np.concatenate([[0], np.cumsum(size)])
        yield [flat[a:b] for a, b in pairwise(ends)]


def _read(path: Path, total: int) -> Logprobs | None:
    """Return what an earlier run stored, or None."""
    try:
        arrays, _ = read_tensors(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except (OSError, SnapshotError) as error:
        log.warning("%s cannot be used, so it is computed again: %s", path, error)
        return None

    flat = arrays.get("logps")
    if flat is None or flat.dtype != mx.float32 or flat.shape != (total,):
        log.warning("%s does not hold %d log-probs, so it is computed again", path, total)
        return None
    return cast("Logprobs", np.array(flat))


def _write(path: Path, flat: Logprobs) -> None:
    """Store the log-probs by one rename; if that fails, training continues without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"logps": mx.array(flat)}, {"format": "mlx"})
    except (OSError, SnapshotError) as error:
        log.warning(
            "reference log-probs are not stored, so the next run computes them again: %s. "
            "HF_DATASETS_CACHE names another folder.",
            error,
        )
        return
    log.info("reference log-probs: stored in %s", path)
