"""The rewards of a batch of groups as advantages, after checks that they can be learned from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.objectives.advantages import Advantages, advantages
from learner.online.experience import PromptGroup, reward_matrix
from protocol.config.settings import GrpoRewards, GrpoSettings
from protocol.errors import RewardError


@dataclass
class RewardAdvantages:
    """Turns the rewards of batches into advantages, one batch after the other."""

    settings: GrpoSettings
    rewards: GrpoRewards
    _none_batches: int = 0

    def of(self, groups: Sequence[PromptGroup], group_index: np.ndarray) -> Advantages:
        """Return the advantages (N,) of the completions of `groups`; `group_index` (N,).

        Raises RewardError after `max_none_batches` batches without any reward, or where
        `reward_weights` do not fit the functions that answered.
        """
        names, rewards = reward_matrix(groups)
        self._check_some(names, rewards, groups)
        weights = self.rewards.reward_weights
        if names and weights is not None and len(weights) != len(names):
            raise RewardError(
                f"rewards.reward_weights has {len(weights)} numbers, but {len(names)} reward "
                f"functions answered: {', '.join(names)}. Give one weight per function, in order."
            )

        return advantages(
            rewards,
            groups=group_index,
            names=names,
            weights=weights if names else None,
            scale_rewards=self.settings.scale_rewards,
            aggregation=self.settings.multi_objective_aggregation,
        )

    def _check_some(
        self, names: list[str], rewards: np.ndarray, groups: Sequence[PromptGroup]
    ) -> None:
        self._none_batches = self._none_batches + 1 if np.isnan(rewards).all() else 0
        if self._none_batches < self.rewards.max_none_batches:
            return

        faults = {
            f"{fault.function}: {fault.kind}: {fault.message.splitlines()[-1]}"
            for item in groups
            for fault in item.group.reward.faults
            if fault.message
        }
        raise RewardError(
            f"Every reward of {self._none_batches} batches in a row was None "
            f"(functions: {', '.join(names) or 'none answered'}). "
            f"{' '.join(sorted(faults)[:5])} See the reward server's log; fix the functions, "
            "then continue with --run.resume."
        )
