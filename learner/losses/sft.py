"""The loss of plain fine-tuning, equal to TRL 1.16.0's SFTTrainer and mlx-lm's `default_loss`."""

import mlx.core as mx


def sft_loss(logprobs: mx.array, *, mask: mx.array, tokens: mx.array) -> mx.array:
    """Return a micro-batch's share of the mean negative log-prob of the tokens that count.

    `logprobs`, `mask` (B, C) float32, nats; `tokens` () is the number of such tokens in the whole
    batch.
    """
    return -mx.where(mask > 0, logprobs * mask, 0.0).sum() / tokens
