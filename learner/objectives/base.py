"""What the objectives share: log-probs without a gradient, and those of a reference policy."""

# pyright: reportMissingTypeStubs=false

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

from learner.data.examples import Logprobs
from learner.losses.metrics import Mean, token_mean
from learner.model.batches import TokenArrays, TokenBatch, aligned
from learner.model.logprobs import Head, TokenScores, completion_logprobs
from protocol.config.preference_checks import check_preference
from protocol.config.settings import PreferenceSettings
from protocol.errors import ConfigError

ExampleT = TypeVar("ExampleT")


class ReferenceLayout(Protocol[ExampleT]):
    """How examples become the token batches that a reference scores.

    A step lays them out the same way, because the last bits of log-probs depend on the shapes.
    """

    def reference_inputs(self, batch: Sequence[ExampleT]) -> Iterator[TokenBatch]:
        """Yield the token batches of a batch's micro-batches, in order."""
        ...

    def with_reference(
        self, batch: Sequence[ExampleT], logprobs: Iterator[list[Logprobs]]
    ) -> list[ExampleT]:
        """Return the examples with their reference log-probs.

        `logprobs` yields those of each of `reference_inputs`: an array per sequence, unpadded.
        """
        ...


def scores_with_metrics(model: nn.Module, arrays: TokenArrays, head: Head) -> TokenScores:
    """Return the token scores that an offline loss and its metrics read."""
    return completion_logprobs(
        model,
        arrays["input_ids"],
        arrays["positions"],
        arrays["targets"],
        head=head,
        entropy=True,
        logit_metrics=True,
    )


def frozen_logprobs(
    model: nn.Module, arrays: TokenArrays, head: Head, temperature: float = 1.0
) -> mx.array:
    """Return log-probs (B, C), nats, without a gradient."""
    return completion_logprobs(
        model,
        arrays["input_ids"],
        arrays["positions"],
        arrays["targets"],
        temperature=temperature,
        head=head,
        gradient=False,
    ).logprobs


def reference_logprobs(
    reference: nn.Module | None,
    arrays: TokenArrays,
    tokens: TokenBatch,
    stored: Sequence[Logprobs | None],
    head: Head,
) -> mx.array:
    """Return the reference's log-probs (B, C), nats: the `stored` ones if every sequence has them.

    Raises ValueError if neither they nor a reference are available.
    """
    known = [logprobs for logprobs in stored if logprobs is not None]
    if len(known) < len(stored):
        if reference is None:
            raise ValueError(
                "these examples have no precomputed reference log-probs, and there is no reference "
                "policy to compute them with"
            )
        return frozen_logprobs(reference, arrays, head)

    lengths = [len(logprobs) for logprobs in known]
    wanted = tokens.mask.sum(axis=1).astype(int).tolist()
    if lengths != wanted:
        raise ValueError(
            f"precomputed reference log-probs are of {lengths} tokens, the completions have "
            f"{wanted}: they belong to other examples"
        )
    return mx.array(aligned(known, tokens))


def side_means(scores: TokenScores, mask: mx.array, chosen: mx.array) -> dict[str, Mean]:
    """Return `logits/*` of each side, means over completion tokens; `chosen` (B, C) is its mask.

    As in TRL's DPO and KTO; its ORPO and CPO include prompts and padding, which would make the
    means depend on the micro-batches.
    """
    return {
        "logits/chosen": token_mean(scores.mean_logits, chosen),
        "logits/rejected": token_mean(scores.mean_logits, mask - chosen),
    }


def check_settings(
    settings: PreferenceSettings, reference: nn.Module | None, *, needs_reference: bool
) -> None:
    """Raise ConfigError for settings that cannot be met."""
    check_preference(settings)
    given = reference is not None or settings.precompute_ref_log_probs
    if needs_reference and not given:
        raise ConfigError(
            f"objective.method = {settings.method!r} needs a reference policy, and none "
            'was given: set model.reference to "initial", "base" or a path (for DPO alone, '
            "objective.reference_free = true does without)"
        )
