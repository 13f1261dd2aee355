"""What the device says about its memory, and the bound on MLX's cache."""

import mlx.core as mx
import pytest

from protocol.messages.parts import MemoryUse
from protocol.model.device_memory import device_memory, limit_buffer_cache, memory_use


class Gpu:
    type = mx.DeviceType.gpu


@pytest.fixture
def info(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    found: dict[str, object] = {"device_name": "CUDA", "total_memory": 150_000_000_000}
    monkeypatch.setattr(mx, "default_device", Gpu)
    monkeypatch.setattr(mx, "device_info", lambda: found)
    return found


def test_a_gpu_says_what_it_may_use(info: dict[str, object]):
    assert device_memory() == 150_000_000_000
    info["max_recommended_working_set_size"] = 100
    assert device_memory() == 100


@pytest.mark.parametrize(
    ("memory", "before", "bound"),
    [(16 << 30, 12 << 30, 1 << 30), (141 << 30, 120 << 30, 2 << 30), (16 << 30, 1 << 20, 1 << 20)],
)
def test_the_cache_is_bounded_by_a_sixteenth_and_never_raised(
    info: dict[str, object], monkeypatch: pytest.MonkeyPatch, memory: int, before: int, bound: int
):
    limits = [before]

    def set_cache_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx, "set_cache_limit", set_cache_limit)
    info["total_memory"] = memory
    assert limit_buffer_cache() == bound
    assert limits[-1] == bound


def test_memory_is_that_of_the_arrays_held():
    mx.synchronize()
    before = memory_use()
    array = mx.zeros((1 << 20,))
    mx.eval(array)
    after = memory_use()
    assert after.active_bytes - before.active_bytes == pytest.approx(4 << 20, abs=1 << 16)
    assert after.peak_bytes >= after.active_bytes


def test_memory_in_metrics_and_summed():
    use = MemoryUse(active_bytes=10**9, peak_bytes=3 * 10**9, cache_bytes=5 * 10**8)
    assert use.metrics("memory/") == {
        "memory/active_gb": 1.0,
        "memory/peak_gb": 3.0,
        "memory/cache_gb": 0.5,
    }
    assert (use + use).peak_bytes == 6 * 10**9
