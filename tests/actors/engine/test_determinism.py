"""With `deterministic`, a completion's tokens and log-probs are the same bits in any company."""

import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen3
from mlx_lm.tuner.utils import linear_to_lora_layers

from actors.engine.base import GenerationRequest
from actors.engine.decoding.shapes import FIXED_ON_CPU, Shapes
from actors.engine.decoding.slots import cache_shapes
from actors.engine.decoding.trials import place_matters
from actors.engine.mlx_engine import MlxEngine
from protocol.errors import ModelError
from protocol.messages.parts import Completion, Sampling
from tests.actors.engine.engines import engine_of
from tests.actors.engine.test_caches import state_space

ABSENT = 77  # the exit status of a program that did not find OpenBLAS
VOCAB = 300
ROWS = 72
PROMPT = list(range(5, 26))


def adapted_model() -> nn.Module:
    """Make a Qwen3 with adapters that change its output, large enough for several BLAS kernels."""
    mx.random.seed(0)
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=256,
            num_hidden_layers=2,
            intermediate_size=768,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            rms_norm_eps=1e-6,
            vocab_size=VOCAB,
            max_position_embeddings=512,
            rope_theta=1e4,
            tie_word_embeddings=True,
        )
    )
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 8, "scale": 2.0, "dropout": 0.0})
    randomise(model, 1)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Give every adapter another B."""
    mx.random.seed(seed)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.1
    mx.eval(model.parameters())


def request(key: str, prompt: list[int], seed: int, count: int, length: int) -> GenerationRequest:
    sampling = Sampling(num_generations=count, max_completion_length=length)
    return GenerationRequest(key=key, prompt_ids=prompt, sampling=sampling, seed=seed)


class Crowd:
    """Companions that join a few at a time, with prompts and lengths of their own."""

    def __init__(self, size: int) -> None:
        self._left, self._number = size, 0
        self._random = np.random.default_rng(size)

    def join(self, engine: MlxEngine) -> None:
        """Add a group, if any companions are left."""
        if not self._left:
            return
        count = min(self._left, int(self._random.integers(1, 9)))
        prompt = self._random.integers(1, VOCAB, self._random.integers(1, 60)).tolist()
        length = int(self._random.integers(2, 16))
        engine.add(request(f"other {self._number}", prompt, 100 + self._number, count, length))
        self._left, self._number = self._left - count, self._number + 1


def completion_among(companions: int, swap_at: int) -> Completion:
    """Sample 24 tokens of PROMPT while companions come and go; swap weights before a step."""
    model = adapted_model()
    engine = engine_of(
        model,
        stop_token_ids=[],
        vocab_size=VOCAB,
        max_concurrent_completions=ROWS,
        max_tokens=75,  # of the companions; so that all share a block
        deterministic=True,
    )
    crowd = Crowd(companions)
    crowd.join(engine)
    engine.step()
    engine.step()

    engine.add(request("ours", PROMPT, 3, 1, 40))
    for number in range(200):
        if number % 2 == 0:
            crowd.join(engine)
        if number == swap_at:
            engine.set_policy(lambda: randomise(model, 2), 1, "d1")
        for result in engine.step().finished:
            if result.key == "ours":
                return result.completions[0]
    raise AssertionError("the completion did not end")


def test_a_completion_is_the_same_bits_alone_and_among_64():
    alone = completion_among(0, swap_at=10)
    assert [span.start for span in alone.policy_spans] == [0, 11]
    for companions in (1, 7, 64):
        # A batch that was running has a draw in flight, in which a newcomer has no part.
        among = completion_among(companions, swap_at=11)
        assert among.policy_spans == alone.policy_spans
        assert among.token_ids == alone.token_ids
        assert among.sampling_logprobs == alone.sampling_logprobs


def test_weights_below_float32_cannot_be_deterministic():
    model = adapted_model()
    model.set_dtype(mx.bfloat16)
    with pytest.raises(ModelError, match=r'set model.dtype = "float32"'):
        engine_of(model, vocab_size=VOCAB, deterministic=True)


def test_a_model_that_mlx_lm_batches_cannot_be_deterministic():
    with pytest.raises(ModelError, match=r"run.deterministic needs a model that decodes in slots"):
        engine_of(state_space(), deterministic=True)


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS serves MLX on Linux only")
def test_the_bits_are_the_same_with_the_kernels_of_openblas():
    # It chooses them by the number of rows, unlike the plain loops that MLX has without it.
    program = (
        "import os; from launch.processes.blas import deterministic_kernels, load_openblas\n"
        "os.environ.update(deterministic_kernels())\n"
        f"if not load_openblas(): raise SystemExit({ABSENT})\n"
        "from tests.actors.engine import test_determinism as tests\n"
        "tests.test_a_completion_is_the_same_bits_alone_and_among_64()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode == ABSENT:
        pytest.skip("libopenblas is not installed")
    assert done.returncode == 0, done.stderr


class Uneven(nn.Module):
    """A model whose logits differ in the last bits from row to row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = model.layers

    def __call__(self, inputs: mx.array, cache=None) -> mx.array:
        logits = self.model(inputs, cache=cache)
        return logits * (1 + 1e-6 * mx.arange(len(inputs))[:, None, None])


def test_kernels_for_which_the_row_matters_are_refused():
    model = adapted_model()
    layers, shapes = cache_shapes(model), Shapes(4, 32, fixed=True)
    assert not place_matters(model, layers, shapes, 9)
    assert place_matters(Uneven(model), layers, shapes, 9)
    with pytest.raises(ModelError, match=r"set OPENBLAS_CORETYPE=Sandybridge in the actor's"):
        engine_of(Uneven(model), vocab_size=VOCAB, deterministic=True)


def test_completions_in_several_blocks_are_those_of_a_block_alone(monkeypatch: pytest.MonkeyPatch):
    shapes = replace(FIXED_ON_CPU, fixed_rows=4)
    monkeypatch.setattr("actors.engine.decoding.shapes.FIXED_ON_CPU", shapes)
    model = adapted_model()
    found: list[list[Completion]] = []
    for rows in (4, 9):
        engine = engine_of(
            model,
            stop_token_ids=[],
            vocab_size=VOCAB,
            max_concurrent_completions=rows,
            max_tokens=48,
            deterministic=True,
        )
        engine.add(request("ours", PROMPT, 3, 9, 12))
        results, tokens = [], 0
        while (step := engine.step()).made_progress:
            results += step.finished
            tokens = max(tokens, step.tokens)
        assert tokens == rows
        found.append(results[0].completions)
    assert found[0] == found[1]
