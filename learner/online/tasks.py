"""A task on the wire: the message that leases it, and the check of the group that answers it."""

from collections.abc import Mapping

import msgspec
import numpy as np

from learner.data.prompts import Prompt
from learner.ledger.ledger import Ledger
from learner.ledger.types import Grant
from protocol.messages.arrays import floats_view, ids_bytes, ids_view
from protocol.messages.messages import Group, Task, TaskKind
from protocol.messages.parts import Sampling


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


def group_error(
    group: Group, sampling: Sampling, vocab_size: int, digests: Mapping[int, str]
) -> str:
    """Return why a group cannot be used, or ''. `digests` are the published policies' by version.

    A learner that trusted a faulty group would crash, or train on tokens of another model.
    """
    completions = group.completions
    if len(completions) != sampling.num_generations:
        return f"{sampling.num_generations} completions are required, got {len(completions)}"
    longest = max(len(completion.token_ids) for completion in completions) // 4
    if longest > sampling.max_completion_length:
        return f"at most {sampling.max_completion_length} tokens are allowed, got {longest}"

    for version, digest in {(s.version, s.digest) for c in completions for s in c.policy_spans}:
        ours = digests.get(version, digest)
        if ours != digest:
            return f"policy {version} has digest {ours}, tokens were sampled by {digest}"
    return _array_error(group, vocab_size)


def _array_error(group: Group, vocab_size: int) -> str:
    """Return what is wrong with a group's numbers, or ''.

    All completions are checked at once: a call per completion costs more than the arithmetic.
    """
    completions = group.completions
    ids = ids_view(b"".join([completion.token_ids for completion in completions]))
    logprobs = floats_view(b"".join([completion.sampling_logprobs for completion in completions]))
    rewards = floats_view(group.reward.rewards)

    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        return f"token IDs must lie in [0, {vocab_size}), got {lowest} to {highest}"
    if not np.isfinite(logprobs).all():
        return "sampling_logprobs must be finite"
    if np.isinf(rewards).any():
        return "rewards must be finite, or NaN for None"
    return ""
