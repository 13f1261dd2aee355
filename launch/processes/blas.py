"""What MLX's Linux backends need before `mlx.core` is imported: OpenBLAS; a short look-ahead."""

import ctypes
import os
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


def bound_lookahead() -> None:
    """Let MLX's CUDA backend queue 200 MB of work at a time; call before `mlx.core` is imported.

    What is queued holds its temporary arrays until it ran. By default that is gigabytes: on an
    H200 a checkpointed step of Qwen3-0.6B takes three times the memory, and no less time. A
    MLX_MAX_MB_PER_BUFFER that is set already stays; Metal's own bound is 50 MB or less.
    """
    if sys.platform == "linux":
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "200")
