"""Functions with the signatures of TRL 1.16.0's `trl.rewards`: what is passed is what they take."""

import re


def think_format_reward(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
    """Conversational completions alone, as TRL's takes them."""
    pattern = r"^<think>(?!.*<think>)(.*?)</think>.*$"
    contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content, re.DOTALL | re.MULTILINE) for content in contents]
    return [1.0 if match else 0.0 for match in matches]


def accuracy_reward(
    completions: list[list[dict[str, str]]], solution: list[str], log_extra=None, **kwargs
) -> list[float | None]:
    """Need the dataset's `solution` column; None where it cannot be judged."""
    return [
        None if not truth else float(completion[0]["content"].endswith(truth))
        for completion, truth in zip(completions, solution, strict=True)
    ]


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int):
    """Make a function, as TRL's factory of that name does."""

    def soft_overlong_punishment_reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
        rewards = []
        for ids in completion_ids:
            length = len(ids)
            if length <= max_completion_len - soft_punish_cache:
                rewards.append(0.0)
            elif length <= max_completion_len:
                beyond = max_completion_len - soft_punish_cache - length
                rewards.append(beyond / soft_punish_cache)
            else:
                rewards.append(-1.0)
        return rewards

    return soft_overlong_punishment_reward
