"""What the device has for memory, what this process takes of it, and a bound on MLX's cache."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import os

import mlx.core as mx

from protocol.messages.parts import MemoryUse

# Freed buffers that MLX keeps: enough that arrays of one layer are reused by the next.
CACHE_SHARE = 1 / 16
MOST_CACHE = 2 << 30


def device_memory() -> int:
    """Return the bytes that the default device may use: a GPU's working set, or physical memory."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_buffer_cache() -> int:
    """Bound the freed buffers that MLX keeps for reuse; return the bound, in bytes.

    By default they may take nearly all of a GPU's memory, which other processes then lack. A lower
    bound that MLX has already (32 MiB on a CPU) stays.
    """
    limit = min(MOST_CACHE, int(device_memory() * CACHE_SHARE))
    before = mx.set_cache_limit(limit)
    if before < limit:
        mx.set_cache_limit(before)
    return min(before, limit)


def memory_use() -> MemoryUse:
    """Return what MLX holds in this process."""
    return MemoryUse(
        active_bytes=mx.get_active_memory(),
        peak_bytes=mx.get_peak_memory(),
        cache_bytes=mx.get_cache_memory(),
    )


def visible_device() -> str:
    """Return the GPUs that this process may use, as the environment says; "" if it does not."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")
