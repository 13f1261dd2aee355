"""A task on the wire: the message that leases it, and the check of the group that answers it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from learner.data.prompts import Prompt
from learner.ledger.ledger import Ledger
from learner.ledger.types import Grant
from protocol.messages.arrays import floats_view, ids_bytes, ids_view
from protocol.messages.messages import Group, Task, TaskKind
from protocol.messages.parts import Completion, Sampling

# A log-prob is a float32 difference of logits. Its error grows with the logits: at 2^14, far above
# those of any model at a temperature worth sampling at, a float32 is exact to 2^-10 nats.
LOGPROB_TOLERANCE = 1e-3

FaultKind = Literal[
    "completions",
    "tokens",
    "logprobs",
    "kept_logmass",
    "rewards",
    "reward_names",
    "policy",
    "lease",
]


@dataclass(frozen=True)
class GroupFault:
    """Why a group cannot be used. `lease`: it is not its sender's to answer."""

    kind: FaultKind
    reason: str


def task_message(
    lease: Grant, prompt: Prompt, sampling: Sampling, run_seed: int, ledger: Ledger
) -> Task:
    """Return the message that tells an actor about its lease."""
    return Task(
        task=lease.task,
        attempt=lease.attempt,
        kind=lease.kind,
        prompt_ids=ids_bytes(prompt.prompt_ids),
        row=msgspec.json.encode(prompt.row),
        sampling=sampling,
        seed=task_seed(run_seed, lease.row_key, lease.kind),
        min_policy_version=lease.min_policy_version,
        pinned_version=lease.pinned_version,
        lease_s=ledger.settings.lease_s,
        trainer_state={
            "global_step": ledger.state.version,
            "max_steps": ledger.settings.total_batches or 0,
        },
    )


def task_seed(run_seed: int, row_key: int | str, kind: TaskKind) -> int:
    """Return a task's sampling seed, 63 bits, from the run's seed, the row's position and the kind.

    It depends neither on the attempt nor on the task's number, so that a resumed run, which leases
    the same rows under new numbers, samples what the first would have sampled.
    """
    entropy = np.random.SeedSequence([run_seed, int(row_key), int(kind == "eval")])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def lease_fault(actor_id: str, claimed: str, holder: str) -> GroupFault | None:
    """Return why `actor_id` may not answer a lease, or None; `claimed` is who the answer is from.

    `holder` has the lease, "" if that is not known any more.
    """
    if claimed != actor_id:
        return GroupFault("lease", f"it is from actor {claimed}, and was sent by {actor_id}")
    if holder not in ("", actor_id):
        return GroupFault("lease", f"the lease is that of actor {holder}, not of {actor_id}")
    return None


def group_fault(
    group: Group,
    sampling: Sampling,
    vocab_size: int,
    digests: Mapping[int, str],
    reward_names: Sequence[str] | None,
) -> GroupFault | None:
    """Return why a group cannot be used, or None. `digests` are the published policies' by version.

    `reward_names` are the run's functions, None while they are not known; a group without names is
    one that a service gave no answer for. A learner that trusted a faulty group would crash, or
    train on tokens of another model.
    """
    wanted, count = sampling.num_generations, len(group.completions)
    if count != wanted:
        return GroupFault("completions", f"{wanted} completions are required, got {count}")
    if np.isinf(floats_view(group.reward.rewards)).any():
        return GroupFault("rewards", "rewards must be finite, or NaN for None")

    names = group.reward.names
    if len(set(names)) != len(names):
        return GroupFault("reward_names", f"reward functions must differ in name, got {names}")
    if names and reward_names is not None and names != list(reward_names):
        reason = f"the run's reward functions are {list(reward_names)}, got {names}"
        return GroupFault("reward_names", reason)

    faults = (_completion_fault(c, sampling, vocab_size, digests) for c in group.completions)
    return next((fault for fault in faults if fault), None)


def _completion_fault(
    completion: Completion, sampling: Sampling, vocab_size: int, digests: Mapping[int, str]
) -> GroupFault | None:
    ids = ids_view(completion.token_ids)
    if ids.size > sampling.max_completion_length:
        reason = f"at most {sampling.max_completion_length} tokens are allowed, got {ids.size}"
        return GroupFault("completions", reason)
    if ids.min() < 0 or ids.max() >= vocab_size:
        reason = f"token IDs must lie in [0, {vocab_size}), got {ids.min()} to {ids.max()}"
        return GroupFault("tokens", reason)

    if reason := _logs_error(completion.sampling_logprobs):
        return GroupFault("logprobs", f"sampling_logprobs {reason}")
    if reason := _logs_error(completion.kept_logmass):
        return GroupFault("kept_logmass", f"kept_logmass {reason}")

    for span in completion.policy_spans:
        ours = digests.get(span.version, span.digest)
        if ours != span.digest:
            return GroupFault(
                "policy",
                f"policy {span.version} has digest {ours}, tokens were sampled by {span.digest}",
            )
    return None


def _logs_error(data: bytes) -> str:
    """Return what is wrong with logarithms of probabilities, or ""."""
    values = floats_view(data)
    if not np.isfinite(values).all():
        return "must be finite"
    if values.size and values.max() > LOGPROB_TOLERANCE:
        return f"must be at most 0, got {values.max():g} (rounding allows {LOGPROB_TOLERANCE:g})"
    return ""
