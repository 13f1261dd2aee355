"""SFT over rows of tokens: examples to arrays, and the token-mean loss of a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from learner.data.examples import SftExample
from learner.interfaces import Arrays, Prepared
from learner.losses.metrics import finish_metrics, merge_metrics, token_mean
from learner.losses.sft import sft_loss
from learner.model.batches import sequence_batch, to_device
from learner.model.logprobs import Head, completion_logprobs
from protocol.config.settings import TrainSettings


@dataclass
class SftObjective:
    """Cross-entropy of the tokens that count, averaged over those of the whole batch.

    Equal to TRL 1.16.0's SFTTrainer, which divides by the label tokens of the accumulation window;
    so do `entropy` and `mean_token_accuracy`.
    """

    train: TrainSettings
    head: Head
    num_iterations: int = 1

    def prepare(self, batch: Sequence[SftExample]) -> Prepared:
        """Return the arrays of a batch, `micro_batch_size` rows a micro-batch."""
        counted = sum(float(np.sum(example.completion_mask[1:])) for example in batch)
        size = self.train.micro_batch_size
        micro: list[Arrays] = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            tokens = sequence_batch(
                [example.input_ids for example in part],
                masks=[np.asarray(example.completion_mask, np.float32) for example in part],
                length_bucket=self.train.length_bucket,
            )
            arrays = cast(Arrays, to_device(tokens))
            arrays["normaliser"] = mx.array(max(counted, 1.0), dtype=mx.float32)
            micro.append(arrays)
        total = float(sum(len(example.input_ids) for example in batch))
        return Prepared(micro, {"batch_tokens": total}, step=counted > 0)

    def loss(self, model: nn.Module, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """Return a micro-batch's share of the loss and its mergeable metrics."""
        scores = completion_logprobs(
            model,
            arrays["input_ids"],
            arrays["positions"],
            arrays["targets"],
            head=self.head,
            entropy=True,
            logit_metrics=True,
        )
        mask = arrays["mask"]
        metrics: Arrays = token_mean("entropy", scores.entropies, mask)
        metrics |= token_mean("mean_token_accuracy", scores.top1, mask)
        return sft_loss(scores.logprobs, mask=mask, tokens=arrays["normaliser"]), metrics

    def merge(self, first: Arrays, second: Arrays) -> Arrays:
        """Merge the metrics of two micro-batches."""
        return merge_metrics(first, second)

    def finish(self, metrics: Arrays) -> dict[str, Any]:
        """Turn merged metrics into logged ones."""
        return finish_metrics(metrics)
