"""OpenBLAS for MLX's CPU backend on Linux: loaded before `mlx.core`, it takes over."""

import ctypes
import sys

HINT = (
    "OpenBLAS was not found: matrix products on this CPU are some twenty times slower. "
    "Debian and Ubuntu have it as libopenblas0-pthread."
)


def load_openblas() -> bool:
    """Make OpenBLAS serve MLX's matrix products; call before `mlx.core` is imported.

    Returns False where it is needed and absent (Linux without the library); True elsewhere.
    """
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
