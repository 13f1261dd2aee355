"""Full fine-tuning in bfloat16 at a rate far below its resolution, compared with float32."""

import json

import mlx.core as mx
import numpy as np
import pytest

from tests.benchmarks.movements import Plan, compare
from tests.tiny import write_model_folder


def test_masters_move_as_float32_does_and_the_model_has_them_rounded(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(f"w{n}" for n in rng.integers(2, 64, 12))} for _ in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = Plan(model=folder, data=str(data), steps=20, rows=8, length=16, rate=1e-6, every=10)
    ways = {}

    def watch(now):
        ways.update(now)
        weights, masters = now["bfloat16"].weights(), now["bfloat16"].masters()
        for name, master in masters.items():
            assert (master.dtype, weights[name].dtype) == (mx.float32, mx.bfloat16)
            assert mx.array_equal(weights[name], master.astype(mx.bfloat16)), name

    table = list(compare(plan, watch))
    assert [row.step for row in table] == [10, 20]
    numbers = sum(array.size for array in ways["float32"].start.values())
    for row in table:
        exact, ours, naive = (row.movements[name] for name in ("float32", "bfloat16", "naive"))
        # A step of Adam moves a number by at most the rate, and the first step by exactly that.
        assert 0.5 < exact.norm / (row.step * plan.rate * numbers**0.5) < 1
        assert ours.ratio == pytest.approx(1, abs=1e-3)
        assert ours.cosine > 0.999
        assert naive.ratio < 0.1
        assert naive.cosine < 0.1
    gains = table[-1].gains
    assert gains["float32"] > 5e-5
    assert gains["masters"] == pytest.approx(gains["float32"], rel=0.05)
    assert gains["naive"] < 0.1 * gains["float32"]
    assert ways["bfloat16"].losses == pytest.approx(ways["float32"].losses, rel=1e-3)
