"""What MLX's Linux backends need before `mlx.core` is imported: OpenBLAS, one GPU, less memory."""

import ctypes
import os
import sys

from launch.processes.gpus import use_one_gpu

HINT = (
    "OpenBLAS was not found: matrix products on this CPU are about twenty times slower. "
    "Debian and Ubuntu have it as libopenblas0-pthread."
)


def prepare_mlx() -> list[str]:
    """Load OpenBLAS and choose a GPU, before `mlx.core` is imported; return advice for the user."""
    found = [use_one_gpu(), "" if load_openblas() else HINT]
    return [advice for advice in found if advice]


def load_openblas() -> bool:
    """Make MLX use OpenBLAS for matrix products; call before `mlx.core` is imported.

    Returns False where it is needed and missing (Linux without the library); True elsewhere.
    """
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def bound_lookahead() -> None:
    """Limit the work that MLX's CUDA backend queues to 200 MB; call before importing `mlx.core`.

    Queued work holds its temporary arrays until it has run. By default that is gigabytes: on an
    H200 a checkpointed step of Qwen3-0.6B takes three times the memory, and no less time. If
    MLX_MAX_MB_PER_BUFFER is set already, it stays; Metal's own limit is 50 MB or less.
    """
    if sys.platform == "linux":
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", "200")
