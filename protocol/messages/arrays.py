"""Arrays in messages: little-endian bytes, of the dtype that the field's name implies.

Token IDs are int32, log-probs and rewards float32. `ids_view` and `floats_view` decode without a
copy; lists of floats would take about 300 times as long to decode.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


def ids_bytes(token_ids: Iterable[int] | Int32Array) -> bytes:
    """Encode token IDs as little-endian int32."""
    if not isinstance(token_ids, np.ndarray):
        token_ids = np.fromiter(token_ids, dtype=np.int32)
    return token_ids.astype("<i4", copy=False).tobytes()


def ids_view(data: bytes | memoryview) -> Int32Array:
    """Decode `ids_bytes` as a read-only view (N,) int32."""
    return np.frombuffer(data, dtype="<i4")


def floats_bytes(values: Sequence[float] | Float32Array) -> bytes:
    """Encode floats as little-endian float32."""
    return np.asarray(values, dtype="<f4").tobytes()


def floats_view(data: bytes | memoryview) -> Float32Array:
    """Decode `floats_bytes` as a read-only view (N,) float32."""
    return np.frombuffer(data, dtype="<f4")
