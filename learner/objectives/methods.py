"""The methods of offline training: what distinguishes each from the others, in one table.

To add one, name it in `method` of `protocol/config/objective_settings.py`. A method over pairs then
needs a row of `PAIR_METHODS` in `learner/losses/preference.py`; any other, its objective and a row
of `METHODS` here.
"""

# pyright: reportMissingTypeStubs=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.nn as nn

from learner.data.examples import (
    E,
    PreferenceExample,
    SftExample,
    UnpairedExample,
    answers,
    pairs,
    sequences,
)
from learner.data.filter import Builder
from learner.data.tokens import Tokenizer
from learner.interfaces import Objective
from learner.losses.kto import kto_weight_advice
from learner.losses.preference import PAIR_METHODS, needs_reference, needs_whole_batch
from learner.model.logprobs import Head
from learner.objectives.base import ReferenceLayout
from learner.objectives.kto import KtoLayout, KtoObjective
from learner.objectives.preference import PairLayout, PreferenceObjective
from learner.objectives.sft import SftObjective
from protocol.config.settings import PreferenceRun, SftRun

RunT = TypeVar("RunT", SftRun, PreferenceRun)


@dataclass(frozen=True, kw_only=True)
class OfflineMethod(Generic[RunT, E]):
    """A method of offline training; the functions take the run's settings."""

    builder: Callable[[RunT, Tokenizer], Builder[E]]  # of examples, from dataset rows
    # From the policy, its head and the reference, if there is one
    objective: Callable[[RunT, nn.Module, Head, nn.Module | None], Objective[Sequence[E], Any]]
    sequences: int = 1  # per example
    needs_reference: Callable[[RunT], bool] = lambda _: False
    needs_whole_batch: Callable[[RunT], bool] = lambda _: False  # in one micro-batch
    # Of reference log-probs computed before training, where the run asks for them
    reference_layout: Callable[[RunT], ReferenceLayout[E] | None] = lambda _: None
    advice: Callable[[RunT, Sequence[E]], str] = lambda run, examples: ""  # on the examples, or ""


def _answer_advice(run: PreferenceRun, examples: Sequence[UnpairedExample]) -> str:
    good = sum(example.label for example in examples)
    return kto_weight_advice(good, len(examples) - good, run.objective)


_SFT: OfflineMethod[SftRun, SftExample] = OfflineMethod(
    builder=lambda run, tokenizer: sequences(
        run.data, tokenizer, completion_only_loss=run.objective.completion_only_loss
    ),
    objective=lambda run, model, head, reference: SftObjective(run.train, head),
)
_PAIRS: OfflineMethod[PreferenceRun, PreferenceExample] = OfflineMethod(
    builder=lambda run, tokenizer: pairs(run.data, tokenizer),
    objective=lambda run, model, head, reference: PreferenceObjective(
        run.objective, run.train, head, model, reference
    ),
    sequences=2,
    needs_reference=lambda run: needs_reference(run.objective),
    needs_whole_batch=lambda run: needs_whole_batch(run.objective),
    reference_layout=lambda run: (
        PairLayout(run.objective, run.train) if run.objective.precompute_ref_log_probs else None
    ),
)
_KTO: OfflineMethod[PreferenceRun, UnpairedExample] = OfflineMethod(
    builder=lambda run, tokenizer: answers(run.data, tokenizer),
    objective=lambda run, model, head, reference: KtoObjective(
        run.objective, run.train, head, model, reference
    ),
    needs_reference=lambda run: True,
    reference_layout=lambda run: (
        KtoLayout(run.objective, run.train) if run.objective.precompute_ref_log_probs else None
    ),
    advice=_answer_advice,
)

METHODS: dict[str, OfflineMethod[Any, Any]] = {
    "sft": _SFT,
    **dict.fromkeys(PAIR_METHODS, _PAIRS),
    "kto": _KTO,
}


def method_of(run: SftRun | PreferenceRun) -> OfflineMethod[Any, Any]:
    """Return the method that a run trains with."""
    return METHODS["sft" if isinstance(run, SftRun) else run.objective.method]
