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
    def total(self) -> int:
        """Return the number of prompts that were compared."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """Return the share in [0, 1], NaN without a common prompt."""
        return (self.wins + self.ties / 2) / self.total if self.total else math.nan

    @property
    def error(self) -> float:
        """Return the rate's standard error over prompts."""
        if self.total == 0:
            return math.nan
        second = (self.wins + self.ties / 4) / self.total
        return math.sqrt(max(0.0, second - self.rate**2) / self.total)


def win_rate(first: Scores, second: Scores) -> WinRate:
    """Compare two runs on the prompts that both answered and that have a score from both."""
    common = first.keys() & second.keys()
    wins = sum(first[prompt] > second[prompt] for prompt in common)
    ties = sum(first[prompt] == second[prompt] for prompt in common)
    return WinRate(wins, ties, len(common) - wins - ties)


def latest_answers(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the evaluation's lines of the newest policy version, by prompt."""
    return _answers_at(rollouts, max(_versions(rollouts), default=0))


def first_answers(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the lines of the oldest evaluation, by prompt; none if there was only one."""
    versions = _versions(rollouts)
    return _answers_at(rollouts, min(versions)) if len(versions) > 1 else {}


def _versions(rollouts: Sequence[Mapping[str, Any]]) -> set[int]:
    return {line.get("trained_at", 0) for line in rollouts if _answers(line)}


def _answers(line: Mapping[str, Any]) -> bool:
    return line.get("kind") == "eval" and bool(line.get("completions"))


def _answers_at(rollouts: Sequence[Mapping[str, Any]], version: int) -> dict[str, dict[str, Any]]:
    return {
        key_of(line.get("prompt")): dict(line)
        for line in rollouts
        if _answers(line) and line.get("trained_at", 0) == version
    }


def key_of(prompt: object) -> str:
    """Return a prompt as text that identifies it."""
    return prompt if isinstance(prompt, str) else msgspec.json.encode(prompt).decode()


def recorded_scores(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the sums of the rewards that the run itself recorded, if it did, by prompt."""
    found: dict[str, float] = {}
    for key, line in answers.items():
        rewards: list[list[float | None]] = line.get("rewards") or []
        values = [value for value in (rewards[0] if rewards else []) if value is not None]
        if values:
            found[key] = float(sum(values))
    return found
