"""SFT over sequences of tokens: examples to arrays, and the token-mean loss of a micro-batch."""

# pyright: reportMissingTypeStubs=false

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from learner.data.examples import SftExample
from learner.interfaces import Prepared
from learner.losses.metrics import Metrics, token_mean
from learner.losses.sft import sft_loss
from learner.model.batches import TokenArrays, sequence_batch, to_device
from learner.model.logprobs import Head
from learner.objectives.base import scores_with_metrics
from protocol.config.settings import TrainSettings


class SftArrays(TokenArrays):
    """A micro-batch of sequences."""

    tokens: mx.array  # () float32: those that count in the whole batch


@dataclass
class SftObjective:
    """Cross-entropy of the tokens that count, averaged over those of the whole batch.

    Equal to TRL 1.16.0's SFTTrainer, which divides by the label tokens of the accumulation window;
    so do `entropy` and `mean_token_accuracy`.
    """

    train: TrainSettings
    head: Head
    num_iterations: int = 1

    def prepare(self, batch: Sequence[SftExample]) -> Prepared[SftArrays]:
        """Return the arrays of a batch, `micro_batch_size` examples per micro-batch."""
        counted = sum(float(np.sum(example.completion_mask[1:])) for example in batch)
        size = self.train.micro_batch_size

        micro: list[SftArrays] = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            tokens = sequence_batch(
                [example.input_ids for example in part],
                masks=[np.asarray(example.completion_mask, np.float32) for example in part],
                length_bucket=self.train.length_bucket,
            )
            whole = mx.array(max(counted, 1.0), dtype=mx.float32)
            micro.append({**to_device(tokens), "tokens": whole})

        total = float(sum(len(example.input_ids) for example in batch))
        return Prepared(micro, {"batch_tokens": total}, step=counted > 0)

    def loss(self, model: nn.Module, arrays: SftArrays) -> tuple[mx.array, Metrics]:
        """Return a micro-batch's share of the loss, and its metrics."""
        scores = scores_with_metrics(model, arrays, self.head)
        mask = arrays["mask"]
        loss = sft_loss(scores.logprobs, mask=mask, tokens=arrays["tokens"])
        means = {
            "entropy": token_mean(scores.entropies, mask),
            "mean_token_accuracy": token_mean(scores.top1, mask),
        }
        return loss, Metrics(means=means)
