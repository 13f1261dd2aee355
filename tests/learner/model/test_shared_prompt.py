"""A prompt computed once for all completions of a group, against whole sequences."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from learner.data.prompts import Prompt
from learner.losses.metrics import Metrics, finish_metrics, merge_metrics
from learner.model import chunked
from learner.model.batches import to_device, token_batch
from learner.model.layers import layer_by_layer
from learner.model.logprobs import Head, completion_logprobs
from learner.model.shared_prompt import after_prompt, group_batch, shared_prompt
from learner.model.trials import choose_shared_prompt
from learner.objectives.grpo import GrpoObjective
from learner.online.experience import PromptGroup, TrainBatch
from learner.optim.step import Step
from protocol.config.settings import (
    GrpoRewards,
    GrpoSettings,
    GrpoTrain,
    ModelSettings,
    OptimizerSettings,
    SamplingSettings,
)
from protocol.errors import ModelError
from protocol.messages.arrays import floats_bytes
from protocol.model.adapters import attach_adapters
from protocol.model.snapshots import trainable
from tests.protocol.builders import a_completion, a_group, a_reward, task_id
from tests.tiny import VOCAB, tiny_model

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LENGTHS = (5, 1, 0, 20)  # of completions


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 24)


def policy(kind, **changes):
    model = tiny_model(**GQA | changes)
    attach_adapters(model, ModelSettings(fine_tune_type=kind))
    mx.random.seed(1)
    for name, array in trainable(model).items():
        if name.endswith("lora_b"):
            model.load_weights([(name, mx.random.normal(array.shape) * 0.1)], strict=False)
    return model


def group_arrays(prompt_length, *, bucket=8, seed=0) -> tuple[Any, Any]:
    """Make the same group as whole rows and as rows that go on from the last prompt token."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(2, VOCAB, prompt_length, dtype=np.int32)
    rows = [rng.integers(2, VOCAB, n, dtype=np.int32) for n in LENGTHS]
    whole = token_batch([prompt] * len(rows), rows, length_bucket=bucket)
    own = token_batch([prompt[-1:]] * len(rows), rows, length_bucket=bucket)
    return to_device(whole), {**to_device(own), "prompt": shared_prompt(prompt, bucket)}


def results(
    model: nn.Module, arrays: Any, *, recompute: bool = False,
    head: Head = "chunked",
) -> tuple[mx.array, dict[str, mx.array]]:  # fmt: skip
    """Return log-probs and entropies (2, B, C), and gradients; no two tokens count alike."""
    mask = arrays["mask"]
    mx.random.seed(2)
    weights = mx.random.normal((2, mask.shape[0], 32))[:, :, : mask.shape[1]] * mask

    def loss(model: nn.Module) -> tuple[mx.array, mx.array]:
        scores = completion_logprobs(
            model, arrays["input_ids"], arrays["positions"], arrays["targets"],
            prompt=arrays.get("prompt"), temperature=0.7, head=head, entropy_gradient=True,
        )  # fmt: skip
        values = mx.stack([scores.logprobs, scores.entropies])
        return (values * weights).sum(), values * mask

    with layer_by_layer(model, recompute=recompute):
        (_, values), tree = nn.value_and_grad(model, loss)(model)
    return values, dict(tree_flatten(tree))


def assert_equal(left, right, values=2e-6, gradients=2e-5):
    """Compare each array within a tolerance relative to its largest number."""
    assert left[1].keys() == right[1].keys()
    pairs = [("values", left[0], right[0], values)]
    pairs += [(name, left[1][name], array, gradients) for name, array in right[1].items()]
    for name, got, wanted, tolerance in pairs:
        scale = np.abs(np.array(wanted)).max() + 1e-6
        assert np.abs(np.array(got) - np.array(wanted)).max() <= tolerance * scale, name


@pytest.mark.parametrize("prompt_length", [1, 2, 17, 33])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_log_probs_entropies_and_gradients_equal_those_of_whole_sequences(
    model_type, kind, recompute, prompt_length
):
    model = policy(kind, model_type=model_type)
    whole, shared = group_arrays(prompt_length)
    expected = results(model, whole)
    assert_equal(results(model, shared, recompute=recompute), expected)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False}, {"model_type": "gemma2"}])
def test_all_logits_at_once_are_equal_too(changes):
    if changes.get("model_type") == "gemma2":
        changes = changes | {
            "final_logit_softcapping": 2.0, "attn_logit_softcapping": 50.0,
            "query_pre_attn_scalar": 16.0,
        }  # fmt: skip
    model = policy("full", **changes)
    whole, shared = group_arrays(11)
    expected = results(model, whole, head="full")
    assert_equal(results(model, shared, head="full"), expected)
    assert_equal(results(model, shared), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_tokens_that_only_the_prompt_has(recompute):
    model = policy("full", tie_word_embeddings=False)
    whole, shared = group_arrays(6)
    prefix = set(np.array(shared["prompt"].prompt_ids)[0, :5].tolist())
    prefix -= set(np.array(shared["input_ids"]).ravel().tolist())
    assert len(prefix) >= 2
    name = "model.embed_tokens.weight"
    wanted = np.array(results(model, whole)[1][name])[sorted(prefix)]
    got = np.array(results(model, shared, recompute=recompute)[1][name])[sorted(prefix)]
    assert np.abs(wanted).max(axis=1).min() > 1e-3
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_padding_changes_nothing():
    model = policy("full")
    _, shared = group_arrays(5)
    ids = np.array(shared["prompt"].prompt_ids)
    assert ids.shape == (1, 8)
    ids[0, 4:] = [7, 9, 11, 13]
    values, grads = results(model, shared)
    others = results(
        model, {**shared, "prompt": shared["prompt"]._replace(prompt_ids=mx.array(ids))}
    )
    assert mx.array_equal(values, others[0])
    assert_equal(others, (values, grads), 0.0, 1e-6)
    wide = group_arrays(5, bucket=32)[1]
    assert wide["prompt"].prompt_ids.shape == (1, 32)
    values = values[:, :, :20]
    wide_values, wide_grads = results(model, wide)
    assert_equal((wide_values[:, :, :20], wide_grads), (values, grads))


def test_a_window_is_refused_whatever_the_cache():
    prompt = shared_prompt([1, 2, 3], 8)
    model: Any = tiny_model()

    def network(ids, cache):
        cache[0].make_mask(ids.shape[1], window_size=4)
        return model.model(ids, cache=cache)

    with pytest.raises(ModelError, match="window of 4 tokens"):
        after_prompt(network, 2, prompt, mx.array([[3, 4]]))


def trained_group(number, rewards, lengths, prompt, cut=()):
    rng = np.random.default_rng(number)
    completions = [
        a_completion(
            rng.integers(2, VOCAB, length).tolist(),
            version=0,
            sampling_logprobs=floats_bytes([-3.0] * length),
            finish_reason="length" if index in cut else "stop",
        )
        for index, length in enumerate(lengths)
    ]
    made = a_group(completions, task_id(number), reward=a_reward(rewards))
    return PromptGroup(Prompt(row_key=number, prompt_ids=prompt, row={"prompt": "p"}), made)


BATCH = TrainBatch(
    [
        trained_group(0, [0.0, 1.0, 0.0, 3.0, 1.0], [2, 7, 1, 5, 3], [2, 3, 4, 9, 8, 7]),
        trained_group(1, [1.0, 1.0, 1.0, 1.0, 1.0], [3, 3, 4, 1, 2], [5, 6, 2]),
        trained_group(2, [0.0, 1.0, 1.0, 3.0, 0.0], [1, 1, 1, 1, 6], [7, 3, 2, 9, 5, 7, 8, 2, 3]),
    ],
    0,
)


def step_of(share, kind, *, size=1, recompute=False, compiled=False, **settings):
    """Accumulate BATCH; return objective, micro-batches, loss, metrics and gradients."""
    model = policy(kind)
    reference = tiny_model(seed=5, **GQA)
    reference.freeze()
    model.train()
    made = GrpoObjective(
        GrpoSettings(**settings), GrpoTrain(micro_batch_size=size, length_bucket=4),
        SamplingSettings(temperature=0.8, max_completion_length=16), GrpoRewards(),
        model, "chunked", lambda *_: {}, reference=reference, share_prompt=share,
    )  # fmt: skip
    prepared = made.prepare(BATCH)
    assert prepared.step
    step = Step(
        model, OptimizerSettings(), total_steps=1, compiled=compiled,
        gradient_checkpointing=recompute, reads=[reference],
    )  # fmt: skip
    total, merged = 0.0, None
    for arrays in prepared.micro:
        loss, metrics = step.accumulate(arrays, made.loss)
        total += loss.item()
        merged = metrics if merged is None else merge_metrics(merged, metrics)
    return made, prepared.micro, total, finish_metrics(merged or Metrics()), step.gradients()


SETTINGS = {
    "defaults": {},
    "recomputed": {"old_logprobs": "recompute", "beta": 0.1, "entropy_coef": 0.01},
    "quantile": {"top_entropy_quantile": 0.5, "loss_type": "grpo"},
    "corrected": {"old_logprobs": "recompute", "importance_sampling_correction": True},
}


@pytest.mark.parametrize(("kind", "recompute"), [("lora", False), ("lora", True), ("full", False)])
@pytest.mark.parametrize("case", SETTINGS)
def test_a_batch_has_the_same_loss_gradient_and_metrics(case, kind, recompute):
    made, micro, *shared = step_of(True, kind, recompute=recompute, **SETTINGS[case])
    _, plain_micro, *whole = step_of(False, kind, recompute=recompute, **SETTINGS[case])
    assert len(micro) == len(plain_micro)
    assert all("prompt" in arrays for arrays in micro)
    assert micro[0]["input_ids"].shape[1] < plain_micro[0]["input_ids"].shape[1]
    assert shared[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-7)
    assert shared[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)
    assert_equal((mx.zeros(1), shared[2]), (mx.zeros(1), whole[2]), gradients=5e-5)
    for arrays in micro:
        if "old_logprobs" in arrays:
            with layer_by_layer(made.model, recompute=recompute):
                logprobs, *_ = completion_logprobs(
                    made.model, arrays["input_ids"], arrays["positions"], arrays["targets"],
                    prompt=arrays.get("prompt"), temperature=0.8, entropy=True,
                )  # fmt: skip
            assert mx.array_equal(logprobs, arrays["old_logprobs"])


def test_several_groups_and_groups_that_would_save_no_tokens_stay_whole():
    _, micro, *_ = step_of(True, "lora", size=3)
    assert all("prompt" not in arrays for arrays in micro)
    prompt, rows = [2, 3, 4, 5, 6], [[7, 8, 9]] * 3
    cases = [
        (prompt, rows, True),  # 4 + 3 * 4 tokens instead of 3 * 8
        (prompt, rows[:1], False),  # 4 + 4, and 8 in one sequence
        (prompt[:2], rows, False),  # 4 + 3 * 4, and 3 * 4 in whole sequences
        (prompt[:1], rows, False),
    ]
    for start, completions, shares in cases:
        masks = [np.ones(3, np.float32)] * len(completions)
        given = {"masks": masks, "length_bucket": 4}
        starts = [start] * len(completions)
        tokens, shared = group_batch(starts, completions, one_prompt=True, **given)
        assert (shared is not None) is shares
        assert tokens.input_ids.shape[1] == (4 if shares or len(start) < 3 else 8)
        assert group_batch(starts, completions, one_prompt=False, **given)[1] is None


def flat(tree: Any) -> Any:
    return tree_flatten(tree)


@pytest.mark.slow  # a C++ compiler runs for each kernel on CPU
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_equals_eager(recompute):
    assert choose_shared_prompt(
        [policy("lora")], "auto", head="chunked", gradient_checkpointing=recompute, compiled=True
    )
    # Both groups have the same shapes, so that one trace serves prompts of 6 tokens and of 9.
    eager = step_of(True, "lora", recompute=recompute)
    compiled = step_of(True, "lora", recompute=recompute, compiled=True)
    assert len({tuple(array.shape for _, array in flat(arrays)) for arrays in eager[1]}) == 1
    assert compiled[2] == eager[2]
    assert all(mx.array_equal(array, eager[4][name]) for name, array in compiled[4].items())
