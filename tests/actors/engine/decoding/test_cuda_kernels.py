"""The kernels for NVIDIA GPUs against plain operations; only on such a GPU."""

import mlx.core as mx
import numpy as np
import pytest

from actors.engine.decoding.cuda_kernels import add_adapters, attend, can_attend

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize(
    ("outputs", "ranks", "rows"),
    [((2048, 1024, 1024), (16, 16, 16), 64), ((1024,), (16,), 129), ((100, 37), (4, 8), 5)],
)
def test_adapters_are_added_to_the_outputs_of_their_layers(outputs, ranks, rows):
    mx.random.seed(0)
    total = sum(outputs)
    y = mx.random.normal((rows, 1, total + sum(ranks)))
    b = np.zeros((sum(ranks), total), np.float32)
    expected = []
    begin, low = 0, total
    for count, rank in zip(outputs, ranks, strict=True):
        block = np.array(mx.random.normal((rank, count)))
        b[low - total : low - total + rank, begin : begin + count] = block
        plain = np.array(y)
        expected.append(
            plain[..., begin : begin + count] + 2.5 * (plain[..., low : low + rank] @ block)
        )
        begin, low = begin + count, low + rank

    found = add_adapters(y, mx.array(b), outputs=outputs, ranks=ranks, scale=2.5)
    for each, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(each, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "heads", "shared", "dim", "capacity", "columns"),
    [
        (64, 16, 8, 128, 384, 256),
        (5, 4, 4, 64, 96, 96),
        (7, 32, 4, 32, 128, 64),
        (3, 8, 1, 256, 160, 130),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])  # memory order of columns and dimensions
def test_attention_sees_the_columns_of_its_mask(
    rows, heads, shared, dim, capacity, columns, swapped
):
    mx.random.seed(0)
    shape = (rows + 3, shared, dim, capacity) if swapped else (rows + 3, shared, capacity, dim)
    k, v = (mx.random.normal(shape) for _ in range(2))
    if swapped:
        k, v = k.swapaxes(2, 3), v.swapaxes(2, 3)
    k, v = k[:rows, :, :columns], v[:rows, :, :columns]
    q = mx.random.normal((rows, 1, heads, dim)).transpose(0, 2, 1, 3)
    mask = mx.random.uniform(shape=(rows, 1, 1, columns)) < 0.4
    mask = mask | (mx.arange(columns) == 7)
    assert can_attend(q, k, v, mask)

    wide = [np.repeat(np.array(each), heads // shared, axis=1) for each in (k, v)]
    scores = np.einsum("nhld,nhcd->nhlc", np.array(q), wide[0]) * 0.1
    scores = np.where(np.array(mask), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    found = attend(q, k, v, scale=0.1, mask=mask)
    np.testing.assert_allclose(found, weights @ wide[1], rtol=1e-4, atol=1e-4)
