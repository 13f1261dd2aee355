"""Reference log-probs of offline preference training, computed before the first step and kept.

TRL's `precompute_ref_log_probs`: one pass of the reference over all examples, after which steps
need no reference. Results are kept where `datasets` keeps its own ($HF_DATASETS_CACHE, by default
~/.cache/huggingface/datasets), in the folder `pippin`, under a digest of the token batches that the
reference saw and of all else that its numbers depend on. So another order or seed finds them again
where micro-batches stay the same, and nothing stale is ever found.

A row is computed in the micro-batch that the first epoch puts it in. With micro-batches of one pair
or row, or in sequential order, every epoch has the same ones, and the numbers are bit for bit those
that the step would compute; elsewhere later epochs pad rows otherwise and differ by rounding.
"""

import hashlib
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from learner.data.examples import Logprobs
from learner.model.batches import TokenBatch, to_device
from learner.model.logprobs import Head
from learner.model.reference import Reference
from learner.objectives.base import ReferenceLayout, frozen_logprobs
from protocol.errors import SnapshotError
from protocol.model.snapshots import read_tensors, write_tensors

log = logging.getLogger("pippin.learner")

LAYOUT = 1  # of the file; changes with anything that makes older ones unusable
_REPORT_S = 10.0

Batch = Sequence[Any]  # of examples


@dataclass(frozen=True)
class Scorer:
    """The reference with what else decides its numbers."""

    reference: Reference
    head: Head
    layout: ReferenceLayout[Any]

    def inputs(self, batches: Sequence[Batch]) -> Iterator[TokenBatch]:
        """Yield the token batches of all batches, in order."""
        for batch in batches:
            yield from self.layout.reference_inputs(batch)

    def score(self, tokens: TokenBatch) -> Logprobs:
        """Return the log-probs (tokens,) of the rows one after the other, without padding."""
        logprobs = frozen_logprobs(self.reference.model, to_device(tokens), self.head)
        return np.array(logprobs)[tokens.mask > 0]

    def identity(self) -> str:
        """Describe all but the tokens that the numbers depend on, to the last bit."""
        flat = cast("list[tuple[str, mx.array]]", tree_flatten(self.reference.model.parameters()))
        types = sorted({str(array.dtype) for _, array in flat})
        device = f"{mx.default_device()} {platform.machine()}"
        packages = [f"{name} {version(name)}" for name in ("mlx", "mlx-lm")]
        return "\n".join(
            [f"layout {LAYOUT}", self.reference.digest, self.head, device, *types, *packages]
        )


def cache_folder() -> Path:
    """Return the folder of precomputed log-probs, beside what `datasets` caches."""
    from datasets import config  # takes seconds, and only these runs need it here

    return Path(config.HF_DATASETS_CACHE) / "pippin"


def precompute(
    batches: Sequence[Batch],
    scorer: Scorer,
    folder: Path,
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[Any]] | None:
    """Return the batches with reference log-probs in their examples; None if it was `stopped`.

    They come from `folder` where it has them; else they are computed and, if the disk takes them,
    stored there. A file that is damaged counts as absent. `stopped` is asked before every
    micro-batch; nothing is stored then.
    """
    began = time.monotonic()
    digests, sizes = _survey(scorer.inputs(batches))
    order = sorted(range(len(digests)), key=digests.__getitem__)
    starts = np.zeros(len(sizes), np.int64)
    starts[order] = np.cumsum([0, *(sizes[index].sum() for index in order)])[:-1]
    total = int(sum(size.sum() for size in sizes))
    digest = hashlib.sha256(scorer.identity().encode())
    for index in order:
        digest.update(digests[index])
    path = folder / f"ref-logps-{digest.hexdigest()[:32]}.safetensors"
    flat = _read(path, total)
    rows = sum(len(size) for size in sizes)
    if flat is not None:
        log.info("reference log-probs of %d rows: read from %s", rows, path)
    else:
        flat = _compute(batches, scorer, starts, total, stopped)
        if flat is None:
            return None
        took = time.monotonic() - began
        log.info("reference log-probs of %d rows: computed in %.1f s", rows, took)
        _write(path, flat)
    parts = _rows(flat, starts, sizes)
    return [scorer.layout.with_reference(batch, parts) for batch in batches]


def _survey(inputs: Iterator[TokenBatch]) -> tuple[list[bytes], list[np.ndarray]]:
    """Return the digest of each token batch and the tokens (rows,) of its completions."""
    digests: list[bytes] = []
    sizes: list[np.ndarray] = []
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
    starts: np.ndarray,
    total: int,
    stopped: Callable[[], bool],
) -> Logprobs | None:
    """Return the log-probs (total,) of all token batches, each from its start on; None: stopped."""
    flat = np.empty(total, np.float32)
    reported = time.monotonic()
    for index, tokens in enumerate(scorer.inputs(batches)):
        if stopped():
            log.info(
                "reference log-probs: stopped after %d of %d micro-batches, as asked; they are not "
                "kept, so a resumed run computes them anew",
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


def _rows(flat: Logprobs, starts: np.ndarray, sizes: list[np.ndarray]) -> Iterator[list[Logprobs]]:
    """Yield each token batch's rows, as views of `flat`."""
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
        log.warning("%s cannot be used, so it is made anew: %s", path, error)
        return None
    flat = arrays.get("logps")
    if flat is None or flat.dtype != mx.float32 or flat.shape != (total,):
        log.warning("%s does not hold %d log-probs, so it is made anew", path, total)
        return None
    return np.array(flat)


def _write(path: Path, flat: Logprobs) -> None:
    """Store the log-probs by one rename; without room for them, training goes on all the same."""
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
