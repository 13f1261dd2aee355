"""A made-up batch, over which a learner builds its kernels while the first groups are sampled."""

import numpy as np

from learner.data.prompts import Prompt
from learner.online.experience import PromptGroup, TrainBatch
from protocol.messages.arrays import floats_bytes, ids_bytes
from protocol.messages.messages import Group
from protocol.messages.parts import Completion, PolicySpan, RewardResult, TaskId

LONGEST = 1024  # tokens of a prompt or a completion: kernels hardly depend on lengths, time does


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
