"""Which of two runs answers better, by a reward function: pure functions of answers and scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

Scores = Mapping[str, float]  # by prompt


@dataclass(frozen=True)
class WinRate:
    """How often the first run's answer scored higher; `rate` counts a tie as half a win."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """Return the share in [0, 1], NaN without a common prompt."""
        total = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / total if total else math.nan

    @property
    def error(self) -> float:
        """Return the rate's standard error over prompts."""
        total = self.wins + self.ties + self.losses
        if total == 0:
            return math.nan
        second = (self.wins + self.ties / 4) / total
        return math.sqrt(max(0.0, second - self.rate**2) / total)


def win_rate(first: Scores, second: Scores) -> WinRate:
    """Compare two runs on the prompts that both answered and that have a score from both."""
    common = first.keys() & second.keys()
    wins = sum(first[prompt] > second[prompt] for prompt in common)
    ties = sum(first[prompt] == second[prompt] for prompt in common)
    return WinRate(wins, ties, len(common) - wins - ties)


def latest_answers(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the evaluation's lines of the newest policy version, by prompt."""
    lines = [line for line in rollouts if line.get("kind") == "eval" and line.get("completions")]
    newest = max((line.get("trained_at", 0) for line in lines), default=0)
    return {
        key_of(line.get("prompt")): dict(line) for line in lines if line["trained_at"] == newest
    }


def key_of(prompt: object) -> str:
    """Return a prompt as text that identifies it."""
    return prompt if isinstance(prompt, str) else msgspec.json.encode(prompt).decode()


def recorded_scores(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the sum of the rewards that the run itself recorded, where there are any."""
    found: dict[str, float] = {}
    for key, line in answers.items():
        rows = line.get("rewards") or []
        values = [value for value in (rows[0] if rows else []) if value is not None]
        if values:
            found[key] = float(sum(values))
    return found


def function_scores(spec: str, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return what the reward function `spec` gives for the answers; those with None are left out.

    It runs here, in one call for all answers, with `chosen` and `rejected` as columns where every
    line has them. Raises RewardError where it cannot be loaded or fails.
    """
    import anyio

    from actors.reward_loader import load_rewards
    from actors.rewards import Call
    from protocol.errors import RewardError
    from protocol.messages import ScoreRequest

    (function,) = load_rewards([spec])
    lines = list(answers.values())
    columns = {
        name: [line[name] for line in lines]
        for name in ("chosen", "rejected")
        if lines and all(name in line for line in lines)
    }
    request = ScoreRequest(
        id="compare",
        prompts=[line["prompt"] for line in lines],
        completions=[line["completions"][0] for line in lines],
        completion_ids=[[] for _ in lines],
        columns=columns,
    )
    call = Call(0, function, request)
    outcome = anyio.run(call.run_async) if function.is_async else call.run()
    if outcome.rewards is None:
        raise RewardError(f"--reward {spec}: {outcome.message}; mend the function")
    pairs = zip(answers, outcome.rewards, strict=True)
    return {key: value for key, value in pairs if value is not None}
