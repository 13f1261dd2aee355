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
_MOST_RANKS = 512  # of all layers, in a block's shared memory
_ROWS = 8  # per thread, so that each of B's factors is read once for them
_THREADS = 128
_ATTENTION_THREADS = 256
_MOST_SHARED = 10240  # float32 numbers in a block's shared memory
_HEAD_DIMS = (32, 64, 128, 256)

_Kernel = Callable[..., Sequence[mx.array]]


def can_add_adapters(ranks: Sequence[int]) -> bool:
    """Whether `add_adapters` takes adapters of these ranks."""
    return _on_cuda() and max(ranks) <= _MOST_RANK and sum(ranks) <= _MOST_RANKS


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
template <typename T, int RANK, int RANKS>
__device__ void with_adapter(
    const T* y, const T* b, const float (*reduced)[RANKS], T* out, int column, int begin,
    int count, int low, int total, int width, int first, int last, float scale) {
  float factors[RANK];
  #pragma unroll
  for (int k = 0; k < RANK; ++k) {
    factors[k] = scale * static_cast<float>(b[(long long)(low + k) * total + column]);
  }
  for (int row = first; row < last; ++row) {
    float sum = static_cast<float>(y[(long long)row * width + column]);
    #pragma unroll
    for (int k = 0; k < RANK; ++k) sum += reduced[row - first][low + k] * factors[k];
    out[(long long)row * count + column - begin] = static_cast<T>(sum);
  }
}
"""
    source = f"""
  __shared__ float reduced[{_ROWS}][{sum(ranks)}];
  const int rows = product_shape[0], first = blockIdx.y * {_ROWS};
  const int last = first + {_ROWS} < rows ? first + {_ROWS} : rows;
  for (int i = threadIdx.x; i < (last - first) * {sum(ranks)}; i += {_THREADS}) {{
    const int row = i / {sum(ranks)}, k = i % {sum(ranks)};
    const long long at = (long long)(first + row) * {width} + {total} + k;
    reduced[row][k] = static_cast<float>(product[at]);
  }}
  __syncthreads();
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
"""
    begin = low = 0
    for index, (count, rank) in enumerate(zip(outputs, ranks, strict=True)):
        source += f"""
  if (column >= {begin} && column < {begin + count}) {{
    with_adapter<T, {rank}, {sum(ranks)}>(
        product, factor, reduced, out{index}, column, {begin}, {count}, {low}, {total}, {width},
        first, last, {scale!r}f);
  }}
"""
        begin, low = begin + count, low + rank
    return cast(
        _Kernel,
        mx.fast.cuda_kernel(
            name=_named("with_adapters", header + source),
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
        _on_cuda()
        and length == 1
        and dim in _HEAD_DIMS
        and k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and mask.shape == (rows, 1, 1, columns)
        and heads // k.shape[1] * columns + _ATTENTION_THREADS // 32 * dim <= _MOST_SHARED
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
    # One block per row and head of keys. A warp takes a column at a time, each lane some dimensions
    # of it: first for the scores, then for the values. A warp per query head does the softmax.
    header = """
template <typename T, int N, bool PACKED>
__device__ void load(const T* from, long long step, float* to) {
  struct alignas(N * sizeof(T)) Pack { T values[N]; };
  if constexpr (PACKED) {
    const Pack pack = *reinterpret_cast<const Pack*>(from);
    #pragma unroll
    for (int i = 0; i < N; ++i) to[i] = static_cast<float>(pack.values[i]);
  } else {
    #pragma unroll
    for (int i = 0; i < N; ++i) to[i] = static_cast<float>(from[i * step]);
  }
}

template <typename T, int N, typename Steps>
__device__ bool can_pack(const T* from, const Steps& steps) {
  return steps[3] == 1 && steps[0] % N == 0 && steps[1] % N == 0 && steps[2] % N == 0 &&
      reinterpret_cast<unsigned long long>(from) % (N * sizeof(T)) == 0;
}

template <typename T, int GROUP, int COLUMNS, int EACH, int WARPS, bool PACKED>
__device__ void score(
    const T* keys, long long column_step, long long step, const bool* seen, long long seen_step,
    const float (*query)[EACH], int end, float (*scores)[COLUMNS]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  #pragma unroll 4
  for (int j = warp; j < end; j += WARPS) {
    float key[EACH], sum[GROUP];
    load<T, EACH, PACKED>(keys + j * column_step + lane * EACH * step, step, key);
    #pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      sum[g] = 0.0f;
      for (int i = 0; i < EACH; ++i) sum[g] += query[g][i] * key[i];
      for (int offset = 16; offset > 0; offset /= 2) {
        sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], offset);
      }
    }
    if (lane == 0) {
      const bool visible = seen[j * seen_step];
      for (int g = 0; g < GROUP; ++g) scores[g][j] = visible ? sum[g] : -3.0e38f;
    }
  }
}

template <typename T, int GROUP, int COLUMNS, int EACH, int WARPS, bool PACKED>
__device__ void weigh(
    const T* values, long long column_step, long long step, const float (*weights)[COLUMNS],
    int end, float (*out)[EACH]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  #pragma unroll 4
  for (int j = warp; j < end; j += WARPS) {
    float value[EACH];
    load<T, EACH, PACKED>(values + j * column_step + lane * EACH * step, step, value);
    #pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      for (int i = 0; i < EACH; ++i) out[g][i] += weights[g][j] * value[i];
    }
  }
}
"""
    source = f"""
  constexpr int WARPS = {_ATTENTION_THREADS} / 32;
  constexpr int EACH = DIM / 32;
  __shared__ float scores[GROUP][COLUMNS];
  __shared__ float sums[GROUP];
  __shared__ float parts[WARPS][DIM];
  __shared__ int last;

  const long long row = blockIdx.x / SHARED;
  const long long head = blockIdx.x % SHARED;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* keys = cached_keys + row * cached_keys_strides[0] + head * cached_keys_strides[1];
  const T* values =
      cached_values + row * cached_values_strides[0] + head * cached_values_strides[1];
  const bool* seen = visible + row * visible_strides[0];

  if (threadIdx.x == 0) last = 0;
  __syncthreads();
  for (int j = threadIdx.x; j < COLUMNS; j += blockDim.x) {{
    if (seen[j * visible_strides[3]]) atomicMax(&last, j + 1);
  }}
  float query[GROUP][EACH];
  for (int g = 0; g < GROUP; ++g) {{
    const T* from = queries + row * queries_strides[0] + (head * GROUP + g) * queries_strides[1];
    for (int i = 0; i < EACH; ++i) {{
      query[g][i] = {scale!r}f * static_cast<float>(from[(lane * EACH + i) * queries_strides[3]]);
    }}
  }}
  __syncthreads();
  const int end = last;

  if (can_pack<T, EACH>(cached_keys, cached_keys_strides)) {{
    score<T, GROUP, COLUMNS, EACH, WARPS, true>(
        keys, cached_keys_strides[2], 1, seen, visible_strides[3], query, end, scores);
  }} else {{
    score<T, GROUP, COLUMNS, EACH, WARPS, false>(
        keys, cached_keys_strides[2], cached_keys_strides[3], seen, visible_strides[3], query,
        end, scores);
  }}
  __syncthreads();

  for (int g = warp; g < GROUP; g += WARPS) {{
    float most = -3.0e38f, sum = 0.0f;
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

  float out[GROUP][EACH];
  for (int g = 0; g < GROUP; ++g) {{
    for (int i = 0; i < EACH; ++i) out[g][i] = 0.0f;
  }}
  if (can_pack<T, EACH>(cached_values, cached_values_strides)) {{
    weigh<T, GROUP, COLUMNS, EACH, WARPS, true>(
        values, cached_values_strides[2], 1, scores, end, out);
  }} else {{
    weigh<T, GROUP, COLUMNS, EACH, WARPS, false>(
        values, cached_values_strides[2], cached_values_strides[3], scores, end, out);
  }}

  #pragma unroll
  for (int g = 0; g < GROUP; ++g) {{
    for (int i = 0; i < EACH; ++i) parts[warp][lane * EACH + i] = out[g][i];
    __syncthreads();
    for (int d = threadIdx.x; d < DIM; d += blockDim.x) {{
      float sum = 0.0f;
      for (int w = 0; w < WARPS; ++w) sum += parts[w][d];
      attended[((row * SHARED + head) * GROUP + g) * DIM + d] = static_cast<T>(sum / sums[g]);
    }}
    __syncthreads();
  }}
"""
    return cast(
        _Kernel,
        mx.fast.cuda_kernel(
            name=_named("attend", header + source),
            input_names=["queries", "cached_keys", "cached_values", "visible"],
            output_names=["attended"],
            source=source,
            header=header,
            ensure_row_contiguous=False,
        ),
    )


def _on_cuda() -> bool:
    return mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu


def _named(name: str, source: str) -> str:
    # MLX finds a compiled kernel by its name alone.
    return f"{name}_{zlib.crc32(source.encode()):08x}"
