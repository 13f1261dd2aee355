"""Kernels for decoding on NVIDIA GPUs, each in place of several of MLX's.

What bounds a decode step there is the host, which takes as long to encode a small kernel as a large
one: fewer kernels are what saves time. Both compute in float32 and treat every row alike, wherever
in the batch it is.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (mlx is only partly typed)

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import mlx.core as mx

_MOST_RANK = 64  # factors of B that a thread keeps in registers
_ROWS = 8  # per thread, so that each of B's factors is read once for them
_THREADS = 128
_ATTENTION_THREADS = 256
_MOST_SHARED = 10240  # float32 numbers in a block's shared memory
_HEAD_DIMS = (32, 64, 128, 256)

_Kernel = Callable[..., Sequence[mx.array]]


def can_add_adapters(ranks: Sequence[int]) -> bool:
    """Whether `add_adapters` takes adapters of these ranks."""
    return mx.cuda.is_available() and max(ranks) <= _MOST_RANK


def add_adapters(
    y: mx.array, b: mx.array, *, outputs: Sequence[int], ranks: Sequence[int], scale: float
) -> list[mx.array]:
    """Return the outputs (..., n) of layers with adapters, by one kernel.

    `y` (..., all outputs + all ranks) is what weights and A give, layer after layer; `b` (all
    ranks, all outputs) is block-diagonal.
    """
    *leading, width = y.shape
    rows = y.size // width
    total = sum(outputs)
    kernel = _adapter_kernel(tuple(outputs), tuple(ranks), float(scale))
    return list(
        kernel(
            inputs=[y.reshape(rows, width), b],
            template=[("T", y.dtype)],
            grid=(-(-total // _THREADS) * _THREADS, -(-rows // _ROWS), 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(*leading, count) for count in outputs],
            output_dtypes=[y.dtype] * len(outputs),
        )
    )


@cache
def _adapter_kernel(outputs: tuple[int, ...], ranks: tuple[int, ...], scale: float) -> _Kernel:
    total, width = sum(outputs), sum(outputs) + sum(ranks)
    header = """
template <typename T, int RANK, int ROWS>
__device__ void with_adapter(
    const T* y, const T* b, T* out, int column, int begin, int count, int low, int total,
    int width, int rows, float scale) {
  float factors[RANK];
  #pragma unroll
  for (int k = 0; k < RANK; ++k) {
    factors[k] = scale * static_cast<float>(b[(long long)(low + k) * total + column]);
  }
  const int first = blockIdx.y * ROWS;
  const int last = first + ROWS < rows ? first + ROWS : rows;
  for (int row = first; row < last; ++row) {
    const T* line = y + (long long)row * width;
    float sum = static_cast<float>(line[column]);
    #pragma unroll
    for (int k = 0; k < RANK; ++k) {
      sum += static_cast<float>(line[total + low + k]) * factors[k];
    }
    out[(long long)row * count + column - begin] = static_cast<T>(sum);
  }
}
"""
    source = "  const int column = blockIdx.x * blockDim.x + threadIdx.x;\n"
    begin = low = 0
    for index, (count, rank) in enumerate(zip(outputs, ranks, strict=True)):
        source += (
            f"  if (column >= {begin} && column < {begin + count}) {{\n"
            f"    with_adapter<T, {rank}, {_ROWS}>(product, factor, out{index}, column, {begin}, "
            f"{count}, {low}, {total}, {width}, product_shape[0], {scale!r}f);\n  }}\n"
        )
        begin, low = begin + count, low + rank
    return cast(
        _Kernel,
        mx.fast.cuda_kernel(
            name=_named("with_adapters", source),
            input_names=["product", "factor"],
            output_names=[f"out{index}" for index in range(len(outputs))],
            source=source,
            header=header,
        ),
    )


def can_attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> bool:
    """Whether `attend` takes such arrays."""
    rows, heads, length, dim = q.shape
    columns = k.shape[2]
    return (
        length == 1
        and dim in _HEAD_DIMS
        and k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and mask.shape == (rows, 1, 1, columns)
        and heads // k.shape[1] * (columns + _ATTENTION_THREADS) <= _MOST_SHARED
    )


def attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array) -> mx.array:
    """Return the attention (n, heads, 1, dim) of one query per row and head.

    `k` and `v` (n, fewer heads, columns, dim); `mask` (n, 1, 1, columns) bool says which columns a
    row sees, at least one.
    """
    rows, heads, _, dim = q.shape
    shared = k.shape[1]
    kernel = _attention_kernel(float(scale))
    return kernel(
        inputs=[q, k, v, mask],
        template=[
            ("T", q.dtype),
            ("GROUP", heads // shared),
            ("SHARED", shared),
            ("COLUMNS", k.shape[2]),
            ("DIM", dim),
        ],
        grid=(rows * shared * _ATTENTION_THREADS, 1, 1),
        threadgroup=(_ATTENTION_THREADS, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )[0]


@cache
def _attention_kernel(scale: float) -> _Kernel:
    # One block per row and head of keys: scores by a warp per column, softmax by a warp per query
    # head, then the values by a thread per dimension and part of the columns.
    source = f"""
  constexpr int WARPS = {_ATTENTION_THREADS} / 32;
  constexpr int EACH = DIM / 32;
  constexpr int PARTS = {_ATTENTION_THREADS} / DIM;
  constexpr float LEAST = -3.0e38f;
  __shared__ float scores[GROUP][COLUMNS];
  __shared__ float sums[GROUP];
  __shared__ float parts[GROUP][PARTS][DIM];
  __shared__ int ends[WARPS];

  const long long row = blockIdx.x / SHARED;
  const long long head = blockIdx.x % SHARED;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* own_keys = cached_keys + row * cached_keys_strides[0] + head * cached_keys_strides[1];
  const T* own_values =
      cached_values + row * cached_values_strides[0] + head * cached_values_strides[1];
  const bool* seen = visible + row * visible_strides[0];

  float query[GROUP][EACH];
  for (int g = 0; g < GROUP; ++g) {{
    const T* from = queries + row * queries_strides[0] + (head * GROUP + g) * queries_strides[1];
    for (int i = 0; i < EACH; ++i) {{
      query[g][i] = {scale!r}f * static_cast<float>(from[(lane * EACH + i) * queries_strides[3]]);
    }}
  }}

  int end = 0;
  #pragma unroll 4
  for (int j = warp; j < COLUMNS; j += WARPS) {{
    float sum[GROUP];
    for (int g = 0; g < GROUP; ++g) sum[g] = LEAST;
    if (seen[j * visible_strides[3]]) {{
      end = j + 1;
      for (int g = 0; g < GROUP; ++g) sum[g] = 0.0f;
      const T* key = own_keys + j * cached_keys_strides[2] + lane * EACH;
      for (int i = 0; i < EACH; ++i) {{
        const float x = static_cast<float>(key[i]);
        for (int g = 0; g < GROUP; ++g) sum[g] += query[g][i] * x;
      }}
      for (int g = 0; g < GROUP; ++g) {{
        for (int offset = 16; offset > 0; offset /= 2) {{
          sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], offset);
        }}
      }}
    }}
    if (lane == 0) {{
      for (int g = 0; g < GROUP; ++g) scores[g][j] = sum[g];
    }}
  }}
  if (lane == 0) ends[warp] = end;
  __syncthreads();
  for (int w = 0; w < WARPS; ++w) end = ends[w] > end ? ends[w] : end;

  for (int g = warp; g < GROUP; g += WARPS) {{
    float most = LEAST, sum = 0.0f;
    for (int j = lane; j < end; j += 32) most = fmaxf(most, scores[g][j]);
    for (int offset = 16; offset > 0; offset /= 2) {{
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    }}
    for (int j = lane; j < end; j += 32) {{
      const float weight = expf(scores[g][j] - most);
      scores[g][j] = weight;
      sum += weight;
    }}
    for (int offset = 16; offset > 0; offset /= 2) {{
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }}
    if (lane == 0) sums[g] = sum;
  }}
  __syncthreads();

  const int d = threadIdx.x % DIM, part = threadIdx.x / DIM;
  float out[GROUP];
  for (int g = 0; g < GROUP; ++g) out[g] = 0.0f;
  #pragma unroll 4
  for (int j = part; j < end; j += PARTS) {{
    const float x = static_cast<float>(own_values[j * cached_values_strides[2] + d]);
    for (int g = 0; g < GROUP; ++g) out[g] += scores[g][j] * x;
  }}
  for (int g = 0; g < GROUP; ++g) parts[g][part][d] = out[g];
  __syncthreads();

  for (int g = part; g < GROUP; g += PARTS) {{
    float sum = 0.0f;
    for (int p = 0; p < PARTS; ++p) sum += parts[g][p][d];
    attended[((row * SHARED + head) * GROUP + g) * DIM + d] = static_cast<T>(sum / sums[g]);
  }}
"""
    return cast(
        _Kernel,
        mx.fast.cuda_kernel(
            name=_named("attend", source),
            input_names=["queries", "cached_keys", "cached_values", "visible"],
            output_names=["attended"],
            source=source,
            ensure_row_contiguous=False,
        ),
    )


def _named(name: str, source: str) -> str:
    # MLX finds a compiled kernel by its name alone.
    return f"{name}_{zlib.crc32(source.encode()):08x}"
