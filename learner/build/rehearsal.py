"""A made-up batch, over which a learner builds its kernels while the first groups are sampled."""

from collections.abc import Callable

import numpy as np

from learner.data.prompts import Prompt
from learner.online.experience import PromptGroup, TrainBatch
from learner.optim.step import should_compile
from learner.trainer import Trainer
from protocol.config.settings import GrpoRun
from protocol.messages.arrays import floats_bytes, ids_bytes
from protocol.messages.messages import Group
from protocol.messages.parts import Completion, PolicySpan, RewardResult, TaskId

LONGEST = 1024  # tokens of a prompt or a completion: kernels hardly depend on lengths, time does


def rehearsal(
    settings: GrpoRun, longest_prompt: int | None, trainer: Trainer[TrainBatch]
) -> Callable[[], None] | None:
    """Return what builds the kernels of a step; None where steps are not compiled.

    `longest_prompt` is in tokens, None if unknown.
    """
    if not should_compile(settings.train.compile):
        return None
    batch = rehearsal_batch(
        # The first micro-batch of a step is traced apart from the others.
        groups=min(settings.train.batch_size, 2 * settings.train.micro_batch_size),
        completions=settings.sampling.num_generations,
        rewards=len(settings.rewards.functions),
        prompt_length=longest_prompt or LONGEST,
        completion_length=settings.sampling.max_completion_length,
    )
    return lambda: trainer.rehearse(batch)


def rehearsal_batch(
    *, groups: int, completions: int, rewards: int, prompt_length: int, completion_length: int
) -> TrainBatch:
    """Return `groups` groups whose rewards differ, of at most `LONGEST` tokens each way.

    Every token is 0. `rewards` is the number of reward functions.
    """
    prompt = Prompt(0, [0] * min(prompt_length, LONGEST), {"prompt": ""})
    length = min(completion_length, LONGEST)
    completion = Completion(
        token_ids=ids_bytes([0] * length),
        sampling_logprobs=floats_bytes([-1.0] * length),
        policy_spans=[PolicySpan(start=0, version=0, digest="")],
        finish_reason="stop",
    )

    values = np.repeat(np.arange(completions, dtype=np.float32) % 2, rewards)
    group = Group(
        task=TaskId(run="", incarnation="", number=0),
        attempt=1,
        actor_id="",
        actor_incarnation="",
        learner_incarnation="",
        completions=[completion] * completions,
        reward=RewardResult(
            names=[str(index) for index in range(rewards)], rewards=values.tobytes()
        ),
        started_at=0.0,
        finished_at=0.0,
        generation_s=0.0,
        reward_s=0.0,
    )
    return TrainBatch([PromptGroup(prompt, group)] * groups, trained_at=0)
