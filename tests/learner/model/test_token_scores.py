"""A head's further scores of tokens: TRL's metrics, and vocabularies with masked tokens."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from learner.model import chunked
from learner.model.batches import to_device
from learner.model.logprobs import Head, completion_logprobs
from tests.learner.model.heads import CASES, HEADS, assert_close, gradients, trained
from tests.tiny import ragged_batch


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 24)


class Table(nn.Module):
    """A model whose logits are the rows of a table; it masks the tokens of `masked`."""

    def __init__(self, rows, masked=()):
        super().__init__()
        self.model = nn.Embedding(len(rows), len(rows[0]))
        self.model.weight = mx.array(rows)
        self.lm_head = nn.Linear(len(rows[0]), len(rows[0]), bias=False)
        self.lm_head.weight = mx.eye(len(rows[0]))
        self._masked = masked

    def __call__(self, tokens):
        logits = self.lm_head(self.model(tokens))
        if self._masked:
            logits[..., mx.array(self._masked)] = -mx.inf
        return logits


@pytest.mark.parametrize("case", ["lora", "lora, untied, 4 bits", "full, tied", "soft cap"])
@pytest.mark.parametrize("gradient", [True, False])
def test_logit_metrics_equal_those_of_all_logits(case, gradient):
    model, arrays = CASES[case](), to_device(ragged_batch(bucket=32))
    logits = model(arrays["input_ids"])
    logits = np.take_along_axis(np.array(logits), np.array(arrays["positions"])[..., None], axis=1)
    targets = np.array(arrays["targets"])
    best = np.argmax(logits, axis=-1)
    targets[:, ::2] = best[:, ::2]  # every other token is the likeliest
    for head in HEADS:
        got = completion_logprobs(
            model, arrays["input_ids"], arrays["positions"], mx.array(targets),
            temperature=0.7, head=head, gradient=gradient, logit_metrics=True,
        )  # fmt: skip
        np.testing.assert_allclose(got.mean_logits, logits.mean(-1) / 0.7, rtol=1e-5, atol=1e-6)
        assert np.array_equal(np.array(got.top1), targets == best)
        assert not np.array(got.entropies).any()
        assert got.top1.dtype == got.mean_logits.dtype == mx.float32


def row_of(model, targets, head: Head, **asked):
    """Return scores of `targets` after the tokens 0, 1, 2 and so on."""
    here = mx.arange(len(targets))[None]
    return completion_logprobs(model, here, here, mx.array([targets]), head=head, **asked)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("frozen", [True, False])
def test_of_equal_logits_the_first_is_the_likeliest(head, frozen):
    model = Table([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, -1.0, 5.0], [3.0, 3.0, 1.0]])
    if frozen:
        model.freeze()
    got = row_of(model, [1, 1, 2, 1], head, logit_metrics=True)
    assert got.top1.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    np.testing.assert_allclose(got.mean_logits, [[7 / 3, 2.0, 4 / 3, 7 / 3]], rtol=1e-6)
    unasked = row_of(model, [1, 1, 2, 1], head)
    assert not mx.stack(list(unasked[1:])).any().item()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_logit_metrics_have_no_gradient_and_leave_the_others_alone(kind):
    model, arrays = trained(kind), to_device(ragged_batch())
    ids = arrays["input_ids"], arrays["positions"], arrays["targets"]

    def scores(model, **asked):
        return completion_logprobs(model, *ids, temperature=0.7, entropy_gradient=True, **asked)

    wanted = gradients(model, arrays, scores)[1]
    assert_close(gradients(model, arrays, partial(scores, logit_metrics=True))[1], wanted, 0.0)
    for head in HEADS:

        def metrics(model, head=head):
            return scores(model, logit_metrics=True, head=head)[2:]

        assert not any(g.any().item() for g in gradients(model, arrays, metrics)[1].values())


MASKED = [1, 4, 5]
KEPT = [0, 2, 3, 6]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_masked_tokens_are_as_if_they_were_not_there(head, frozen, temperature):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(30, 7)).astype(np.float32) * 3
    table[3] *= 100  # makes the others nearly impossible
    targets = rng.integers(0, len(KEPT), 30).tolist()
    weights = mx.array(rng.normal(size=(2, 30)).astype(np.float32))

    def scored(rows, masked, targets, head):
        model = Table(rows.tolist(), masked)
        if frozen:
            model.lm_head.freeze()

        def loss(model):
            logprobs, entropies, *_ = row_of(
                model, targets, head, temperature=temperature, entropy_gradient=True
            )
            value = (logprobs * weights[0]).sum() + (entropies * weights[1]).sum()
            return value, (logprobs, entropies)

        (_, values), tree = nn.value_and_grad(model, loss)(model)
        return np.array(mx.stack(values)), {k: np.array(g) for k, g in tree_flatten(tree)}

    values, grads = scored(table, MASKED, [KEPT[t] for t in targets], head)
    wanted, wanted_grads = scored(table[:, KEPT], [], targets, "full")
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
    trunk = grads["model.weight"]
    np.testing.assert_allclose(trunk[:, KEPT], wanted_grads["model.weight"], rtol=1e-5, atol=2e-6)
    assert not trunk[:, MASKED].any()
    if not frozen:
        rows = grads["lm_head.weight"]
        np.testing.assert_allclose(
            rows[np.ix_(KEPT, KEPT)], wanted_grads["lm_head.weight"], rtol=1e-5, atol=1e-4
        )
        assert not rows[MASKED].any()


@pytest.mark.parametrize("head", HEADS)
def test_the_entropy_of_a_masked_vocabulary_by_hand(head):
    model = Table([[2.0, 5.0, 2.0, 2.0, 9.0], [1.0, 0.0, 0.0, 0.0, 0.0]], (1, 4))
    got = row_of(model, [2, 0], head, entropy=True, gradient=False)
    p = np.exp([1.0, 0.0, 0.0]) / (np.e + 2)
    np.testing.assert_allclose(got.entropies[0], [np.log(3), -(p * np.log(p)).sum()], rtol=1e-6)
    np.testing.assert_allclose(got.logprobs[0], [-np.log(3), np.log(p[0])], rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_target_that_is_masked_has_a_finite_gradient(head, frozen):
    model = Table([[2.0, 5.0, 2.0], [1.0, 0.0, 3.0]], (1,))
    if frozen:
        model.lm_head.freeze()

    def loss(model):
        scores = row_of(model, [1, 2], head, entropy_gradient=True)
        return scores.logprobs.sum() + scores.entropies.sum()

    value, grads = nn.value_and_grad(model, loss)(model)
    assert value.item() == -np.inf
    for name, array in dict(tree_flatten(grads)).items():
        assert mx.isfinite(array).all().item(), name
