"""The NVIDIA GPUs that a process may use, found without MLX.

MLX computes on one GPU per process, and a process that sees two fails at random, so every process
of ours sees one.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/gpus")
SMI_TIMEOUT_S = 30.0


def visible_gpus(environment: Mapping[str, str] = os.environ, driver: Path = DRIVER) -> list[str]:
    """Return the GPUs by the names that CUDA_VISIBLE_DEVICES takes; none without NVIDIA.

    Where the user set that variable, they are the ones that it lists, by index or UUID. Else they
    are counted by nvidia-smi, or by the driver's folder where that program is missing.
    """
    if sys.platform == "darwin":
        return []
    if VISIBLE in environment:
        return _listed(environment[VISIBLE])

    smi = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    if smi is not None:
        with suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(
                [smi, "-L"], capture_output=True, text=True, check=True, timeout=SMI_TIMEOUT_S
            )
            lines = found.stdout.splitlines()
            return [str(index) for index in range(sum(line.startswith("GPU ") for line in lines))]

    count = len(list(driver.iterdir())) if driver.is_dir() else 0
    return [str(index) for index in range(count)]


def has_one_gpu(gpus: Sequence[str]) -> bool:
    """Whether MLX will compute on a GPU, and there is one: `gpus` are those of NVIDIA."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return len(gpus) == 1 and any(_installed(name) for name in ("mlx-cuda-12", "mlx-cuda-13"))


def _installed(distribution: str) -> bool:
    with suppress(metadata.PackageNotFoundError):
        metadata.version(distribution)
        return True
    return False


def _listed(text: str) -> list[str]:
    """Return the devices of CUDA_VISIBLE_DEVICES; as in CUDA, the first invalid one ends it."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name in ("", "-1"):
            break
        names.append(name)
    return names


def one_gpu(name: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables with which a process sees only the GPU `name` of `visible_gpus`."""
    if VISIBLE in environment:
        return {VISIBLE: name}
    # nvidia-smi's order, which is not CUDA's own.
    return {VISIBLE: name, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def use_one_gpu() -> str:
    """Make this process see one GPU; call before `mlx.core` is imported.

    Returns what to tell the user if others are left unused, or "".
    """
    gpus = visible_gpus()
    if len(gpus) < 2:
        return ""
    os.environ.update(one_gpu(gpus[0]))
    return f"using the first of {len(gpus)} GPUs; {VISIBLE} chooses another"
