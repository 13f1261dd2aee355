"""A task on the wire: the message that leases it, and the check of the group that answers it."""

from collections.abc import Mapping

import msgspec
import numpy as np

from learner.data.prompts import Prompt
from learner.ledger.ledger import Ledger
from learner.ledger.types import Grant
from protocol.messages.arrays import floats_view, ids_bytes, ids_view
from protocol.messages.messages import Group, Task, TaskKind
from protocol.messages.parts import Completion, Sampling


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
    if len(group.completions) != sampling.num_generations:
        return f"{sampling.num_generations} completions are required, got {len(group.completions)}"
    if np.isinf(floats_view(group.reward.rewards)).any():
        return "rewards must be finite, or NaN for None"
    errors = (_completion_error(c, sampling, vocab_size, digests) for c in group.completions)
    return next((error for error in errors if error), "")


def _completion_error(
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
