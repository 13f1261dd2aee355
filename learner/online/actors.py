"""What the learner knows of its actors, what it asks of them, and whether to believe them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from protocol.messages.arrays import floats_view, ids_view
from protocol.messages.messages import PROTOCOL_VERSION, Group, Hello, Refuse, TaskKind, Welcome
from protocol.messages.parts import Completion, Sampling


@dataclass
class Peer:
    """An actor that said Hello. `credit` is in completions.

    `oldest_needed` is the oldest policy version whose snapshot it may still ask for. `stalled`: its
    leases ran out, and it gets no others until its main thread is known to move.
    """

    actor_id: str
    incarnation: str
    host: str
    last_seen: float
    oldest_needed: int
    credit: int = 0
    stalled: bool = False
    progress: int = -1
    tokens_per_s: float = 0.0
    tokens_sampled: int = 0


@dataclass(frozen=True)
class Terms:
    """What a run asks of its tasks, and what it tells an actor that joins."""

    welcome: Welcome
    train: Sampling
    evaluate: Sampling
    seed: int
    lease_s: float
    vocab_size: int
    actor_timeout_s: float = 30.0

    def sampling(self, kind: TaskKind) -> Sampling:
        """Return how completions of such a task are sampled."""
        return self.train if kind == "train" else self.evaluate


def refusal(hello: Hello, welcome: Welcome) -> Refuse | None:
    """Return why an actor cannot work for this run, naming both sides; None if it can."""
    if hello.protocol_version != PROTOCOL_VERSION:
        return Refuse(
            code="protocol_version",
            reason=f"the learner speaks protocol version {PROTOCOL_VERSION}, actor "
            f"{hello.actor_id} speaks {hello.protocol_version}; install the same version of Pippin "
            "on both",
            fatal=True,
        )
    if is_enquiry(hello):
        return None
    digests: tuple[tuple[Literal["model", "tokenizer"], str, str], ...] = (
        ("model", welcome.model_digest, hello.model_digest),
        ("tokenizer", welcome.tokenizer_digest, hello.tokenizer_digest),
    )
    for code, ours, theirs in digests:
        if ours != theirs:
            return Refuse(
                code=code,
                reason=f"the learner's {code} has digest {ours}, that of actor {hello.actor_id} on "
                f"{hello.host or 'its host'} has {theirs}; give both the same folder",
                fatal=True,
            )
    return None


def is_enquiry(hello: Hello) -> bool:
    """Whether an actor only asks for the terms: it has not loaded its model yet."""
    return not hello.model_digest and not hello.tokenizer_digest


def fault_of(group: Group, sampling: Sampling, vocab_size: int, digests: Mapping[int, str]) -> str:
    """Return why a group cannot be used, or ''. `digests` are those of the policies published."""
    if len(group.completions) != sampling.num_generations:
        return f"{sampling.num_generations} completions are required, got {len(group.completions)}"
    if np.isinf(floats_view(group.reward.rewards)).any():
        return "rewards must be finite, or NaN for None"
    faults = (_fault(c, sampling, vocab_size, digests) for c in group.completions)
    return next((fault for fault in faults if fault), "")


def _fault(
    completion: Completion, sampling: Sampling, vocab_size: int, digests: Mapping[int, str]
) -> str:
    ids = ids_view(completion.token_ids)
    if ids.size > sampling.max_completion_length:
        return f"at most {sampling.max_completion_length} tokens are allowed, got {ids.size}"
    if ids.min() < 0 or ids.max() >= vocab_size:
        return f"token IDs must lie in [0, {vocab_size}), got {ids.min()} to {ids.max()}"
    if not np.isfinite(floats_view(completion.sampling_logprobs)).all():
        return "sampling_logprobs must be finite"
    for span in completion.policy_spans:
        ours = digests.get(span.version, span.digest)
        if ours != span.digest:
            return f"policy {span.version} has digest {ours}, tokens were sampled by {span.digest}"
    return ""
