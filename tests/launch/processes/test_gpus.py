"""How GPUs are counted without MLX: the user's list, nvidia-smi, or the driver's folder."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import pytest

from launch.processes.gpus import VISIBLE, has_one_gpu, one_gpu, use_one_gpu, visible_gpus

LINES = """GPU 0: NVIDIA H200 (UUID: GPU-11111111-2222-3333-4444-555555555555)
GPU 1: NVIDIA H200 (UUID: GPU-66666666-7777-8888-9999-000000000000)
"""


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.platform", "linux")


def smi(folder: Path, text: str, status: int = 0) -> str:
    """Make a folder with an nvidia-smi that answers -L with `text`, for PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 9\necho "{text}"\nexit {status}\n')
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def driver(folder: Path, count: int) -> Path:
    """Make the driver's folder as it is with `count` GPUs."""
    for index in range(count):
        (folder / "gpus" / f"0000:0{index}:00.0").mkdir(parents=True)
    return folder / "gpus"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("2,0", ["2", "0"]),
        (" GPU-1111, GPU-6666 ", ["GPU-1111", "GPU-6666"]),
        ("1,-1,0", ["1"]),
        ("-1", []),
        ("", []),
    ],
)
def test_the_users_list_is_what_there_is(tmp_path: Path, listed: str, expected: list[str]):
    path = smi(tmp_path, LINES)
    assert visible_gpus({VISIBLE: listed, "PATH": path}, driver(tmp_path, 4)) == expected


def test_nvidia_smi_counts_before_the_drivers_folder(tmp_path: Path):
    folder = driver(tmp_path, 3)
    assert visible_gpus({"PATH": smi(tmp_path, LINES)}, folder) == ["0", "1"]
    assert visible_gpus({"PATH": smi(tmp_path, "no devices")}, folder) == []
    assert visible_gpus({"PATH": smi(tmp_path, "driver mismatch", 18)}, folder) == ["0", "1", "2"]
    assert visible_gpus({"PATH": str(tmp_path / "empty")}, folder) == ["0", "1", "2"]
    assert visible_gpus({"PATH": str(tmp_path / "empty")}, tmp_path / "none") == []


def test_a_mac_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert visible_gpus({VISIBLE: "0", "PATH": smi(tmp_path, LINES)}, driver(tmp_path, 1)) == []


def test_indices_are_those_of_nvidia_smi_unless_the_user_named_the_gpus():
    assert one_gpu("1", {}) == {VISIBLE: "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert one_gpu("GPU-66", {VISIBLE: "GPU-11,GPU-66"}) == {VISIBLE: "GPU-66"}


def test_a_process_started_by_hand_takes_the_first_of_several(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VISIBLE, "3,1")
    said = use_one_gpu()
    assert said == "using the first of 2 GPUs; CUDA_VISIBLE_DEVICES chooses another"
    assert os.environ[VISIBLE] == "3"
    assert use_one_gpu() == ""
    assert os.environ[VISIBLE] == "3"


@pytest.mark.parametrize(
    ("platform_name", "machine", "installed", "gpus", "expected"),
    [
        ("darwin", "arm64", [], [], True),
        ("darwin", "x86_64", [], [], False),
        ("linux", "x86_64", ["mlx-cuda-13"], ["0"], True),
        ("linux", "x86_64", ["mlx-cuda-13"], ["0", "1"], False),
        ("linux", "x86_64", ["mlx-cpu"], ["0"], False),
        ("linux", "x86_64", ["mlx-cuda-12"], [], False),
    ],
)
def test_one_gpu_counts_only_where_mlx_computes_on_it(
    monkeypatch: pytest.MonkeyPatch,
    platform_name: str,
    machine: str,
    installed: list[str],
    gpus: list[str],
    expected: bool,
):
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "0"

    monkeypatch.setattr(sys, "platform", platform_name)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(metadata, "version", version)
    assert has_one_gpu(gpus) is expected
