"""Experience from actors: the trainer's end of the bridge to the I/O thread."""

# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.nn as nn

from learner.full_disk import write_patiently
from learner.online.commands import (
    Command,
    EncodedState,
    EndRun,
    NoMoreBatches,
    PublishPolicy,
    QueueMetrics,
    Reply,
    RequestBatch,
    RequestState,
    RestorePolicy,
    ReturnBatch,
    StartEvaluation,
)
from learner.online.experience import EvalResult, TrainBatch
from learner.online.recovery import Recovered
from protocol.messages.messages import Policy
from protocol.model.policy_shelf import PolicyShelf
from protocol.model.snapshots import TensorDigests, trainable, write_snapshot
from protocol.transport.bridge import Bridge

STATE_TIMEOUT_S = 90.0  # longer than the I/O thread waits for a full disk


def snapshot_path(folder: Path, version: int) -> Path:
    """Return where the snapshot of a policy version is."""
    return folder / f"policy-{version:06d}.safetensors"


@dataclass
class OnlineSource:
    """Batches of groups in queue order, evaluations, and metrics of the actors and the queue.

    Snapshots of `model` are written to `folder`, if there is one; the I/O thread deletes superseded
    ones. An actor in this process finds its policies on `shelf`. `recovered` is what an earlier
    learner process of the run left to do.
    """

    bridge: Bridge[Command, Reply]
    model: nn.Module
    folder: Path | None
    shelf: PolicyShelf | None = None
    recovered: Recovered | None = None
    exhausted: bool = False
    _metrics: dict[str, float] = field(default_factory=dict[str, float])
    _batch: TrainBatch | None = None
    _evals: deque[EvalResult] = field(default_factory=deque[EvalResult])
    _state: EncodedState | None = None
    _requested: bool = False

    def poll(self, timeout_s: float = 0.0) -> TrainBatch | None:
        """Return the next batch if it has arrived; wait at most `timeout_s` for any reply."""
        if self.recovered is not None and self.recovered.batches:
            return self.recovered.batches.popleft()
        if not self._requested and not self.exhausted:
            self.bridge.put(RequestBatch())
            self._requested = True

        self._receive(timeout_s)
        batch, self._batch = self._batch, None
        if batch is not None:
            self._requested = False
        return batch

    def begin(self, version: int) -> None:
        """Let actors work for the policy as it is, or for the newest that they could fetch."""
        recovered = self.recovered
        if recovered is not None and recovered.announced is not None:
            policy = recovered.announced
            self.bridge.put(RestorePolicy(policy, Path(policy.path)))
        if recovered is None or recovered.version == version:
            self.publish(version)

    def publish(self, version: int) -> None:
        """Offer the policy as `version`, in a file, on the shelf or both, and announce it.

        A version that an earlier process published is only compared with that.
        """
        arrays = trainable(self.model)
        if self.recovered is not None and self.recovered.is_known(version):
            self.recovered.compare(version, TensorDigests.of(arrays))
            return

        if self.folder is None:
            digests, size, path = TensorDigests.of(arrays), 0, None
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = snapshot_path(self.folder, version)
            write = partial(write_snapshot, path, self.model, version)
            written = write_patiently(write, f"policy version {version}")
            digests, size = written.digests, written.size

        if self.recovered is not None:
            self.recovered.compare(version, digests)
        if self.shelf is not None:
            self.shelf.put(version, digests.whole, arrays)
        policy = Policy(
            version=version,
            digest=digests.whole,
            size=size,
            path=str(path.resolve()) if path is not None else "",
        )
        self.bridge.put(PublishPolicy(policy, path, digests.short))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of actors, queue and ledger as of the last batch."""
        return dict(self._metrics)

    def evaluate(self, version: int) -> None:
        """Have the actors answer the held-out rows with `version`."""
        self.bridge.put(StartEvaluation(version))

    def next_eval(self) -> EvalResult | None:
        """Return a finished evaluation, if there is one."""
        if self.recovered is not None and self.recovered.evaluations:
            return self.recovered.evaluations.popleft()
        self._receive(0.0)
        return self._evals.popleft() if self._evals else None

    def state(self) -> bytes:
        """Return the encoded state of ledger and prompts; waits for the I/O thread."""
        self.bridge.put(RequestState())
        deadline = time.monotonic() + STATE_TIMEOUT_S
        while self._state is None:
            self._receive(1.0)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no state from the I/O thread within {STATE_TIMEOUT_S:g} s")

        state, self._state = self._state, None
        return state.data

    def return_batch(self, reason: str) -> None:
        """Have the batch that was handed out last sampled again."""
        self.bridge.put(ReturnBatch(reason))

    def finish(self, reason: str) -> None:
        """End the I/O thread, which tells the actors to stop."""
        self.bridge.put(EndRun(reason))

    def _receive(self, timeout_s: float) -> None:
        """Store every reply that has arrived, waiting at most `timeout_s` for the first."""
        reply = self.bridge.get(timeout_s)
        while reply is not None:
            match reply:
                case TrainBatch():
                    self._batch = reply
                case EvalResult():
                    self._evals.append(reply)
                case QueueMetrics(values):
                    self._metrics = values
                case EncodedState():
                    self._state = reply
                case NoMoreBatches():
                    self.exhausted = True
            reply = self.bridge.get(0.0)
