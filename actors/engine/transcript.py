"""What was sampled so far, for all rows of an engine at once.

Rows are recorded as arrays, because a step delivers hundreds of tokens between two decode steps
that the host has to launch.
"""

import numpy as np

from actors.engine.base import NO_POLICY
from actors.engine.decoding.decoder import Drawn
from protocol.messages.arrays import floats_bytes, ids_bytes
from protocol.messages.parts import Completion, FinishReason, PolicySpan

_FIRST_LENGTH = 64


class Transcript:
    """The tokens, log-probs and policy spans of the completion in each row."""

    def __init__(self, rows: int) -> None:
        self.counts = np.zeros(rows, np.int64)
        self._tokens = np.zeros((rows, _FIRST_LENGTH), np.int32)
        self._logprobs = np.zeros((rows, _FIRST_LENGTH), np.float32)
        self._kept = np.zeros((rows, _FIRST_LENGTH), np.float32)
        self._versions = np.full(rows, NO_POLICY)
        self._spans: list[list[PolicySpan]] = [[] for _ in range(rows)]

    def start(self, row: int) -> None:
        """Begin a new completion in `row`."""
        self.counts[row] = 0
        self._versions[row] = NO_POLICY
        self._spans[row] = []

    def record(self, drawn: Drawn) -> None:
        """Append one token to each row of `drawn`."""
        rows, at = drawn.rows, self.counts[drawn.rows]
        if at.size and int(at.max()) >= self._tokens.shape[1]:
            self._lengthen()

        self._tokens[rows, at] = drawn.tokens
        self._logprobs[rows, at] = drawn.logprobs
        self._kept[rows, at] = 0.0 if drawn.kept_logmass is None else drawn.kept_logmass
        for row in map(int, rows[self._versions[rows] != drawn.version]):
            start = int(self.counts[row])
            span = PolicySpan(start=start, version=drawn.version, digest=drawn.digest)
            self._spans[row].append(span)
            self._versions[row] = drawn.version
        self.counts[rows] += 1

    def completion(self, row: int, reason: FinishReason, *, filtered: bool) -> Completion:
        """Return what `row` holds; `filtered` says whether its kept log-mass is recorded."""
        count = int(self.counts[row])
        return Completion(
            token_ids=ids_bytes(self._tokens[row, :count]),
            sampling_logprobs=floats_bytes(self._logprobs[row, :count]),
            kept_logmass=floats_bytes(self._kept[row, :count]) if filtered else b"",
            policy_spans=self._spans[row],
            finish_reason=reason,
        )

    def _lengthen(self) -> None:
        self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], axis=1)
        self._logprobs = np.concatenate([self._logprobs, np.zeros_like(self._logprobs)], axis=1)
        self._kept = np.concatenate([self._kept, np.zeros_like(self._kept)], axis=1)
