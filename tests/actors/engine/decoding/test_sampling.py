"""Draws against exact distributions in float64: counts, log-probs, kept mass, impossible tokens."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from actors.engine.decoding.sampling import (
    SamplingParameters,
    draw,
    has_filter,
    splitmix64,
    token_uniforms,
)
from protocol.messages.parts import Sampling

GREATEST = float(np.nextafter(np.float32(1), np.float32(0)))
GREEDY = 0.0


def sampling(temperature: float = 1.0, **filters) -> Sampling:
    return Sampling(num_generations=1, max_completion_length=1, temperature=temperature, **filters)


KINDS = {
    "plain": sampling(),
    "cool": sampling(0.6),
    "hot": sampling(1.8),
    "top-k": sampling(top_k=7),
    "top-p": sampling(top_p=0.8),
    "min-p": sampling(min_p=0.05),
    "all": sampling(1.3, top_k=30, top_p=0.9, min_p=0.02),
}


def uneven_logits(vocab_size: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    """Make logits (V,) float32 around 10, so that nothing hangs on their being normalised."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=vocab_size) * spread + 10).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def exact(logits: np.ndarray, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probs (V,) before the filters, and probabilities (V,) that the filters leave."""
    logprobs = log_softmax(logits / np.float64(how.temperature or 1))
    ordered = np.sort(logprobs)[::-1]

    count = min(how.top_k or len(ordered), len(ordered))
    mass = np.exp(ordered[:count])
    if how.top_p < 1:
        count = int(((np.cumsum(mass) - mass) / mass.sum() < how.top_p).sum())
    least = ordered[count - 1]
    if how.min_p:
        least = max(least, ordered[0] + math.log(how.min_p))

    return logprobs, np.where(logprobs >= least, np.exp(logprobs), 0.0)


def sample(logits: np.ndarray, hows: Sequence[Sampling], uniforms: np.ndarray):
    """Draw once for each row of logits (B, V), or B times from logits (V,).

    Return tokens, log-probs and kept log-mass in NumPy, the latter 0 where none is recorded.
    """
    parameters = SamplingParameters.of(hows, logits.shape[-1])
    rows = mx.broadcast_to(mx.array(logits), (len(hows), logits.shape[-1]))
    drawn = draw(rows, mx.array(uniforms.astype(np.float32)), parameters)
    kept = mx.zeros(len(hows)) if drawn.kept_logmass is None else drawn.kept_logmass
    return np.array(drawn.tokens), np.array(drawn.logprobs), np.array(kept)


def uniforms_of(count: int, seed: int) -> np.ndarray:
    return token_uniforms(np.full(count, seed, dtype=np.uint64), np.arange(count))


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Return Pearson's statistic as a standard normal deviate, by Wilson and Hilferty.

    Tokens of which fewer than eight are expected are counted together.
    """
    expected = probabilities / probabilities.sum() * counts.sum()
    common = expected >= 8
    expected = np.append(expected[common], expected[~common].sum())
    counts = np.append(counts[common], counts[~common].sum())

    used = expected > 0
    assert counts[~used].sum() == 0
    freedom = int(used.sum()) - 1
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    ninth = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - ninth)) / math.sqrt(ninth)


def test_the_hash_is_splitmix64():
    # The first outputs of the reference implementation for the seeds 0 and 1234567.
    found = splitmix64(np.array([0, 1234567], dtype=np.uint64))
    assert found.tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_uniforms_are_even_independent_and_those_of_seed_and_index_alone():
    seeds = np.repeat(np.arange(64, dtype=np.uint64), 1024)
    indices = np.tile(np.arange(1024), 64)
    found = token_uniforms(seeds, indices)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= GREATEST
    assert (found * 2**24 % 1 == 0).all()

    cells = (found * 16).astype(int) @ [16, 1]
    assert abs(chi_squared(np.bincount(cells, minlength=256), np.full(256, 1 / 256))) < 3
    some = np.array([5, 77, 60_000])
    np.testing.assert_array_equal(token_uniforms(seeds[some], indices[some]), found[some])


@pytest.mark.parametrize("vocab_size", [2, 3, 50, 97, 1000, 4099])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_follow_the_distribution(vocab_size, kind):
    logits = uneven_logits(vocab_size)
    count = 20_000 if vocab_size < 1000 else 2_000
    tokens, *_ = sample(logits, [KINDS[kind]] * count, uniforms_of(count, seed=vocab_size))

    counts = np.bincount(tokens, minlength=vocab_size)
    _, left = exact(logits, KINDS[kind])
    assert counts[left == 0].sum() == 0
    if (left > 0).sum() > 1:
        assert chi_squared(counts, left) < 3


def test_counts_of_a_slightly_different_temperature_are_told_apart():
    logits = uneven_logits(97)
    tokens, *_ = sample(logits, [sampling(1.05)] * 20_000, uniforms_of(20_000, seed=1))
    counts = np.bincount(tokens, minlength=97)
    assert chi_squared(counts, exact(logits, sampling(1.05))[1]) < 3
    assert chi_squared(counts, exact(logits, sampling())[1]) > 5


def test_counts_follow_the_distributions_of_a_mixed_batch():
    logits, each = uneven_logits(97, seed=3), 8_000
    hows = [*KINDS.values(), sampling(GREEDY)]
    tokens, *_ = sample(logits, hows * each, uniforms_of(len(hows) * each, seed=2))

    for how, drawn in zip(hows, tokens.reshape(each, len(hows)).T, strict=True):
        counts = np.bincount(drawn, minlength=97)
        _, left = exact(logits, how)
        if how.temperature == GREEDY:
            assert counts[logits.argmax()] == each
            continue
        assert counts[left == 0].sum() == 0
        assert chi_squared(counts, left) < 3


def test_counts_of_a_large_vocabulary():
    logits = uneven_logits(151_936)
    logits[[5, 90_000, 151_935]] += np.array([15, 14, 13], dtype=np.float32)
    hows = [KINDS["plain"]] * 64
    counts = np.zeros(151_936, dtype=int)
    for repeat in range(8):
        tokens, *_ = sample(logits, hows, uniforms_of(64, seed=repeat))
        counts += np.bincount(tokens, minlength=151_936)
    _, left = exact(logits, KINDS["plain"])
    assert 0.05 < left[logits < 20].sum() < 0.3  # the tail counts as one token
    assert chi_squared(counts, left) < 3


IMPOSSIBLE = [-math.inf, -1e30, -1e4]
EDGES = np.array([[u, v] for u in (0.0, 2**-24, 0.5, GREATEST) for v in (0.0, 0.5, GREATEST)])


@pytest.mark.parametrize("vocab_size", [7, 64, 97, 151_936])
@pytest.mark.parametrize("least", IMPOSSIBLE)
def test_no_token_of_probability_0_is_drawn_at_the_edges(vocab_size, least):
    logits = np.full(vocab_size, least, dtype=np.float32)
    for possible in ([vocab_size // 2], [1, vocab_size // 2, vocab_size - 2], [0, vocab_size - 1]):
        logits[:] = least
        logits[possible] = 3.0
        tokens, logprobs, _ = sample(logits, [sampling()] * len(EDGES), EDGES)
        assert set(tokens.tolist()) == set(possible)
        assert tokens[0] == possible[0]
        assert tokens[-1] == possible[-1]
        np.testing.assert_allclose(logprobs, -math.log(len(possible)), atol=1e-6)


@pytest.mark.parametrize("vocab_size", [97, 151_936])
@pytest.mark.parametrize(
    "how", [sampling(top_k=3), sampling(top_p=0.9), sampling(min_p=0.5)], ids=lambda how: str(how)
)
def test_filtered_tokens_are_not_drawn_at_the_edges(vocab_size, how):
    logits = uneven_logits(vocab_size, spread=0.1)
    possible = [3, vocab_size // 2, vocab_size - 1]
    logits[possible] = 40.0
    tokens, _, kept = sample(logits, [how] * len(EDGES), EDGES)
    assert set(tokens.tolist()) == set(possible)
    np.testing.assert_allclose(kept, 0, atol=1e-6)


def test_uniforms_at_their_edges_fall_inside_any_distribution():
    edges = np.array([[u, v] for u in (0.0, GREATEST) for v in (0.0, GREATEST)])
    for seed in range(40):
        logits = uneven_logits(389, seed, spread=0.5 + seed % 7)
        logits[np.random.default_rng(seed).random(389) < 0.5] = -math.inf
        tokens, logprobs, _ = sample(logits, [sampling(1 + seed % 3)] * 4, edges)
        possible = np.flatnonzero(np.isfinite(logits))
        assert tokens[0] == possible[0]
        assert set(tokens.tolist()) <= set(possible.tolist())
        assert np.isfinite(logprobs).all()


def test_tokens_and_logprobs_are_bit_equal_in_any_company():
    hows = [*KINDS.values(), sampling(GREEDY)]
    logits = np.stack([uneven_logits(1000, seed) for seed in range(len(hows))])
    uniforms = uniforms_of(len(hows), seed=9)
    tokens, logprobs, kept = sample(logits, hows, uniforms)

    for order in ([5, 2, 0], [7, 6, 5, 4, 3, 2, 1, 0], *([i] for i in range(len(hows)))):
        some = sample(logits[order], [hows[i] for i in order], uniforms[order])
        np.testing.assert_array_equal(some[0], tokens[order])
        np.testing.assert_array_equal(some[1], logprobs[order])
        recorded = [has_filter(hows[i]) for i in order]
        np.testing.assert_array_equal(some[2][recorded], kept[order][recorded])
    assert (kept[:3] == 0).all()


@pytest.mark.parametrize("vocab_size", [97, 5000, 151_936])
def test_logprobs_and_kept_mass_are_those_of_float64(vocab_size):
    hows = [*KINDS.values(), sampling(GREEDY)] * 3
    logits = uneven_logits(vocab_size, seed=4)
    logits[[1, 2]] = -math.inf
    tokens, logprobs, kept = sample(logits, hows, uniforms_of(len(hows), seed=4))

    for row, how in enumerate(hows):
        expected, left = exact(logits, how)
        assert logprobs[row] == pytest.approx(expected[tokens[row]], abs=5e-6)
        if how.temperature != GREEDY:
            # Sums of 151,936 float32 may end top-p a few tokens early or late.
            border = 3e-4 if how.top_p < 1 and vocab_size > 5000 else 5e-6
            assert kept[row] == pytest.approx(math.log(left.sum()), abs=border)


def test_normalised_logprobs_give_what_logits_give():
    logits = uneven_logits(389)
    hows = [*KINDS.values()] * 40
    uniforms = uniforms_of(len(hows), seed=6)
    from_logits = sample(logits, hows, uniforms)
    from_logprobs = sample(log_softmax(logits).astype(np.float32), hows, uniforms)
    np.testing.assert_array_equal(from_logits[0], from_logprobs[0])
    for left, right in zip(from_logits[1:], from_logprobs[1:], strict=True):
        np.testing.assert_allclose(left, right, atol=5e-6)


def test_tokens_tied_with_the_last_one_kept_are_kept():
    logits = np.array([4.0, 2.0, 2.0, 2.0, 0.0, -1.0], dtype=np.float32)
    tokens, _, kept = sample(logits, [sampling(top_k=2)] * 2_000, uniforms_of(2_000, seed=3))
    assert set(tokens.tolist()) == {0, 1, 2, 3}
    mass = np.exp(log_softmax(logits))[:4].sum()
    np.testing.assert_allclose(kept, math.log(mass), atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_a_draw_can_be_traced(kind):
    parameters = SamplingParameters.of([KINDS[kind]] * 3, 97)
    logits = mx.array(np.stack([uneven_logits(97, seed) for seed in range(3)]))
    uniforms = mx.array(uniforms_of(3, seed=1))

    # An evaluation or a branch on a value raises while it is traced.
    def tokens(logits: mx.array, uniforms: mx.array) -> mx.array:
        return draw(logits, uniforms, parameters).tokens

    traced = mx.compile(tokens)(logits, uniforms)
    np.testing.assert_array_equal(np.array(traced), np.array(tokens(logits, uniforms)))
