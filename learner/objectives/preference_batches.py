"""Examples of preference training as token batches: one layout for training and the reference.

The same functions lay out a batch for its step and for precomputed reference log-probs, so both
see the same shapes, on which the last bits of log-probs depend.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from learner.data.examples import Logprobs, PreferenceExample, UnpairedExample
from learner.losses.preference import kto_loss_type, needs_whole_batch
from learner.model.batches import TokenBatch, token_batch
from protocol.config.settings import PreferenceSettings, TrainSettings

Judged = tuple[list[UnpairedExample], list[list[int]]]  # answers, and KL completions to them


def pair_parts(
    pairs: Sequence[PreferenceExample], settings: PreferenceSettings, train: TrainSettings
) -> Iterator[Sequence[PreferenceExample]]:
    """Split a batch into micro-batches; one of them all for losses that couple all pairs."""
    size = len(pairs) if needs_whole_batch(settings) else train.micro_batch_size
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


def pair_tokens(part: Sequence[PreferenceExample], method: str, bucket: int) -> TokenBatch:
    """Return rows [:B] chosen, [B:] rejected; ORPO's NLL reads the chosen prompts' tokens too.

    There the chosen "completion" is all but the first token, and the mask leaves the rest of
    the prompt out.
    """
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    masks: list[list[float]] = []
    for pair in part:
        kept = 1 if method == "orpo" else len(pair.prompt_ids)
        prompts.append(pair.prompt_ids[:kept])
        completions.append(pair.prompt_ids[kept:] + pair.chosen_ids)
        masks.append([0.0] * (len(pair.prompt_ids) - kept) + [1.0] * len(pair.chosen_ids))
    return token_batch(
        prompts + [pair.rejected_prompt_ids for pair in part],
        completions + [pair.rejected_ids for pair in part],
        masks=masks + [[1.0] * len(pair.rejected_ids) for pair in part],
        length_bucket=bucket,
    )


def nll_of_whole_sequence(part: Sequence[PreferenceExample], mask: mx.array) -> dict[str, mx.array]:
    """Return ORPO's `nll_mask` (2B, C): every token of a chosen sequence but the first."""
    nll = np.zeros(mask.shape, np.float32)
    for row, pair in enumerate(part):
        nll[row, : len(pair.prompt_ids) - 1 + len(pair.chosen_ids)] = 1.0
    return {"nll_mask": mx.array(nll)}


def answer_parts(answers: Sequence[UnpairedExample], train: TrainSettings) -> Iterator[Judged]:
    """Split a batch into micro-batches of answers and their mismatched completions.

    As in TRL, each prompt is followed by its predecessor's answer, the first by the last one's.
    """
    others = [answers[index - 1].completion_ids for index in range(len(answers))]
    for start in range(0, len(answers), train.micro_batch_size):
        stop = start + train.micro_batch_size
        yield list(answers[start:stop]), others[start:stop]


def answer_tokens(
    part: Sequence[UnpairedExample], completions: Sequence[Sequence[int]], bucket: int
) -> TokenBatch:
    """Return a row for each answer's prompt with the completion at its place."""
    return token_batch([a.prompt_ids for a in part], completions, length_bucket=bucket)


def reference_inputs(
    batch: Sequence[PreferenceExample] | Sequence[UnpairedExample],
    settings: PreferenceSettings,
    train: TrainSettings,
) -> Iterator[TokenBatch]:
    """Yield what the reference scores of a batch: its micro-batches, each of KTO's followed by
    that of its mismatched completions where the loss has a KL term."""
    bucket = train.length_bucket
    if settings.method != "kto":
        pairs = [example for example in batch if isinstance(example, PreferenceExample)]
        for part in pair_parts(pairs, settings, train):
            yield pair_tokens(part, settings.method, bucket)
        return
    answers = [example for example in batch if isinstance(example, UnpairedExample)]
    for part, others in answer_parts(answers, train):
        yield answer_tokens(part, [answer.completion_ids for answer in part], bucket)
        if kto_loss_type(settings) == "kto":
            yield answer_tokens(part, others, bucket)


def with_reference(
    batch: Sequence[PreferenceExample] | Sequence[UnpairedExample],
    logprobs: Iterator[list[Logprobs]],
    settings: PreferenceSettings,
    train: TrainSettings,
) -> list[PreferenceExample] | list[UnpairedExample]:
    """Return the batch's examples with their reference log-probs.

    `logprobs` yields the rows of each of `reference_inputs`, without padding.
    """
    if settings.method != "kto":
        pairs: list[PreferenceExample] = []
        given = [example for example in batch if isinstance(example, PreferenceExample)]
        for part in pair_parts(given, settings, train):
            rows = next(logprobs)
            sides = zip(rows[: len(part)], rows[len(part) :], strict=True)
            pairs += [replace(p, ref_logprobs=both) for p, both in zip(part, sides, strict=True)]
        return pairs
    answers: list[UnpairedExample] = []
    judged = [example for example in batch if isinstance(example, UnpairedExample)]
    for part, _ in answer_parts(judged, train):
        own = next(logprobs)
        kl = next(logprobs) if kto_loss_type(settings) == "kto" else [None] * len(part)
        answers += [
            replace(answer, ref_logprobs=ref, kl_ref_logprobs=other)
            for answer, ref, other in zip(part, own, kl, strict=True)
        ]
    return answers
