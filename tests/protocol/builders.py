"""Messages of one small run, for tests of both sides: each takes what it is to be other than here.

The run is "r", its learner "L1", its actor "a0"; version v of the policy has digest "dv".
"""

from collections.abc import Sequence
from typing import Any

from protocol.messages.arrays import floats_bytes, ids_bytes
from protocol.messages.messages import Group, Policy, Task, Welcome
from protocol.messages.parts import (
    Completion,
    PolicySpan,
    RewardResult,
    RewardService,
    Sampling,
    TaskId,
)


def task_id(number: int = 1, incarnation: str = "L1") -> TaskId:
    """Make the identity of a task."""
    return TaskId(run="r", incarnation=incarnation, number=number)


def a_welcome(incarnation: str = "L1", **changes: Any) -> Welcome:
    """Make the terms of a run with one reward service."""
    fields: dict[str, Any] = {
        "run": "r",
        "incarnation": incarnation,
        "model": {},
        "model_digest": "m",
        "tokenizer_digest": "t",
        "rewards": [RewardService(endpoints=["ipc://x"], timeout_s=1.0)],
        "heartbeat_s": 2.0,
        "seed": 7,
    }
    return Welcome(**(fields | changes))


def a_task(number: int = 1, prompt: Sequence[int] = (4, 5), **changes: Any) -> Task:
    """Make a lease of two completions of at most four tokens."""
    fields: dict[str, Any] = {
        "task": task_id(number),
        "attempt": 1,
        "kind": "train",
        "prompt_ids": ids_bytes(prompt),
        "row": b'{"prompt":"2+2","answer":"4"}',
        "sampling": Sampling(num_generations=2, max_completion_length=4),
        "seed": 11,
        "min_policy_version": 3,
        "lease_s": 60.0,
    }
    return Task(**(fields | changes))


def a_policy(version: int) -> Policy:
    """Announce a version."""
    return Policy(version=version, digest=f"d{version}", size=1)


def a_completion(token_ids: Sequence[int], version: int = 3, **changes: Any) -> Completion:
    """Make a completion of one policy; its log-probs are -0.5 nats a token."""
    fields: dict[str, Any] = {
        "token_ids": ids_bytes(token_ids),
        "sampling_logprobs": floats_bytes([-0.5] * len(token_ids)),
        "policy_spans": [PolicySpan(start=0, version=version, digest=f"d{version}")],
        "finish_reason": "stop",
    }
    return Completion(**(fields | changes))


def a_reward(
    values: Sequence[float], names: Sequence[str] = ("f",), **changes: Any
) -> RewardResult:
    """Make what the functions gave: `values` (G, F) in row-major order."""
    return RewardResult(names=list(names), rewards=floats_bytes(values), **changes)


def a_group(completions: Sequence[Completion], task: TaskId | None = None, **changes: Any) -> Group:
    """Make a finished task, by default with a reward of 1 for each completion."""
    fields: dict[str, Any] = {
        "task": task or task_id(),
        "attempt": 1,
        "actor_id": "a0",
        "actor_incarnation": "i0",
        "learner_incarnation": "L1",
        "completions": list(completions),
        "reward": a_reward([1.0] * len(completions)),
        "started_at": 1.0,
        "finished_at": 2.0,
        "generation_s": 1.0,
        "reward_s": 0.5,
    }
    return Group(**(fields | changes))
