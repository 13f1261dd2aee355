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
from protocol.messages.parts import Sampling

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
    longest = max(len(completion.token_ids) for completion in group.completions) // 4
    if longest > sampling.max_completion_length:
        reason = f"at most {sampling.max_completion_length} tokens are allowed, got {longest}"
        return GroupFault("completions", reason)

    names = group.reward.names
    if len(set(names)) != len(names):
        return GroupFault("reward_names", f"reward functions must differ in name, got {names}")
    if names and reward_names is not None and names != list(reward_names):
        reason = f"the run's reward functions are {list(reward_names)}, got {names}"
        return GroupFault("reward_names", reason)

    spans = {(s.version, s.digest) for c in group.completions for s in c.policy_spans}
    for version, digest in spans:
        ours = digests.get(version, digest)
        if ours != digest:
            reason = f"policy {version} has digest {ours}, tokens were sampled by {digest}"
            return GroupFault("policy", reason)
    return _array_fault(group, vocab_size)


def _array_fault(group: Group, vocab_size: int) -> GroupFault | None:
    """Return what is wrong with a group's numbers, or None.

    All completions are checked at once: a call per completion costs more than the arithmetic.
    """
    completions = group.completions
    ids = ids_view(b"".join([completion.token_ids for completion in completions]))
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        reason = f"token IDs must lie in [0, {vocab_size}), got {lowest} to {highest}"
        return GroupFault("tokens", reason)

    if reason := _logs_error([completion.sampling_logprobs for completion in completions]):
        return GroupFault("logprobs", f"sampling_logprobs {reason}")
    if reason := _logs_error([completion.kept_logmass for completion in completions]):
        return GroupFault("kept_logmass", f"kept_logmass {reason}")
    if np.isinf(floats_view(group.reward.rewards)).any():
        return GroupFault("rewards", "rewards must be finite, or NaN for None")
    return None


def _logs_error(parts: list[bytes]) -> str:
    """Return what is wrong with logarithms of probabilities, or ""."""
    values = floats_view(b"".join(parts))
    if not np.isfinite(values).all():
        return "must be finite"
    if values.size and values.max() > LOGPROB_TOLERANCE:
        return f"must be at most 0, got {values.max():g} (rounding allows {LOGPROB_TOLERANCE:g})"
    return ""
