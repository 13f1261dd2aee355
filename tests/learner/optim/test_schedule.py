"""Learning rates against values worked by hand from Transformers' formulas."""

import pytest

from learner.optim.schedule import learning_rate
from protocol.config.settings import OptimizerSettings


@pytest.mark.parametrize(
    ("kind", "warmup", "rates"),
    [
        # (4 - k) / 4
        ("linear", 0, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        # k / 2, then (4 - k) / (4 - 2)
        ("linear", 2, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
        ("constant", 0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("constant", 2, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        # (1 + cos(pi k / 4)) / 2
        ("cosine", 0, [1.0, 0.8535534, 0.5, 0.1464466, 0.0, 0.1464466]),
        ("cosine", 2, [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]),
    ],
)
def test_rates(kind, warmup, rates):
    settings = OptimizerSettings(learning_rate=2.0, lr_scheduler_type=kind, warmup_steps=warmup)
    got = [learning_rate(settings, step, 4) for step in range(6)]
    assert got == pytest.approx([2.0 * rate for rate in rates], abs=1e-6)
