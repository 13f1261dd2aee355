"""Experience from actors: the trainer's end of the bridge to the I/O thread."""

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

from learner.online.commands import (
    Evaluate,
    Exhausted,
    Finish,
    Publish,
    Rates,
    SourceState,
    WantBatch,
    WantState,
)
from learner.online.experience import EvalResult, TrainBatch
from protocol.messages.messages import Policy
from protocol.model.snapshots import write_snapshot
from protocol.transport.bridge import Bridge

STATE_TIMEOUT_S = 60.0


@dataclass
class OnlineSource:
    """Batches of groups in queue order, evaluations, and the actors' figures.

    Snapshots of `model` are written to `folder`; the I/O thread deletes superseded ones.
    """

    bridge: Bridge
    model: nn.Module
    folder: Path
    exhausted: bool = False
    _rates: dict[str, float] = field(default_factory=dict)
    _batch: TrainBatch | None = None
    _evals: deque[EvalResult] = field(default_factory=deque)
    _state: SourceState | None = None
    _asked: bool = False

    def poll(self, timeout_s: float = 0.0) -> TrainBatch | None:
        """Return the next batch if it is there; waits `timeout_s` at most for anything."""
        if not self._asked and not self.exhausted:
            self.bridge.put(WantBatch())
            self._asked = True
        self._take(timeout_s)
        batch, self._batch = self._batch, None
        if batch is not None:
            self._asked = False
        return batch

    def stepped(self, version: int) -> None:
        """Write the policy's tensors and announce them as `version`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"policy-{version:06d}.safetensors"
        written = write_snapshot(path, self.model, version)
        policy = Policy(
            version=version, digest=written.digest, size=written.size, path=str(path.resolve())
        )
        self.bridge.put(Publish(policy, path))

    def figures(self) -> dict[str, float]:
        """Return the actors' rates, the queue and the ledger's counters, as of the last batch."""
        return dict(self._rates)

    def evaluate(self, version: int) -> None:
        """Queue the held-out rows, pinned to `version`."""
        self.bridge.put(Evaluate(version))

    def next_eval(self) -> EvalResult | None:
        """Return an evaluation that came since."""
        self._take(0.0)
        return self._evals.popleft() if self._evals else None

    def state(self) -> bytes:
        """Return ledger and prompts, encoded; waits for the I/O thread."""
        self.bridge.put(WantState())
        deadline = time.monotonic() + STATE_TIMEOUT_S
        while self._state is None:
            self._take(1.0)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no state from the I/O thread within {STATE_TIMEOUT_S:g} s")
        state, self._state = self._state, None
        return state.data

    def finish(self, reason: str) -> None:
        """End the I/O thread: actors are told to stop."""
        self.bridge.put(Finish(reason))

    def _take(self, timeout_s: float) -> None:
        item: Any = self.bridge.get(timeout_s)
        while item is not None:
            match item:
                case TrainBatch():
                    self._batch = item
                case EvalResult():
                    self._evals.append(item)
                case Rates(figures):
                    self._rates = figures
                case SourceState():
                    self._state = item
                case Exhausted():
                    self.exhausted = True
            item = self.bridge.get(0.0)
