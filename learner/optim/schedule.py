"""Learning rates per step, by the formulas of Transformers' `get_scheduler`."""

import math

from protocol.config.settings import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Return the learning rate of optimiser step `step` (from 0) of `total_steps`.

    Warm-up is linear from 0. "constant" has warm-up too, like Transformers'
    "constant_with_warmup".
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * step / max(1, settings.warmup_steps)

    after = max(1, total_steps - settings.warmup_steps)
    match settings.lr_scheduler_type:
        case "constant":
            factor = 1.0
        case "linear":
            factor = max(0.0, (total_steps - step) / after)
        case "cosine":
            progress = (step - settings.warmup_steps) / after
            factor = max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return settings.learning_rate * factor
