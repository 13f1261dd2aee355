"""Which folders of sockets are removed: those of dead runs, and no other."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.transport.endpoints import ipc_folder
from protocol.transport.socket_folders import held, remove_dead


@pytest.fixture
def parent() -> Iterator[Path]:
    with ipc_folder() as folder:  # pytest's own folders have paths too long for sockets
        yield folder


def made(parent: Path, name: str, *sockets: str) -> Path:
    """Make a folder of a run that left some sockets behind."""
    folder = parent / name
    folder.mkdir()
    for path in sockets:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(folder / path))
    return folder


def test_folders_of_dead_runs_are_removed_whole_or_half_deleted(parent: Path):
    whole, half = made(parent, "pippin-a", "learner", "snapshots"), made(parent, "pippin-b")
    assert sorted(remove_dead(parent, older_than_s=0)) == [whole, half]
    assert list(parent.iterdir()) == []


def test_a_folder_whose_launcher_lives_stays(parent: Path):
    folder = made(parent, "pippin-a", "learner")
    with held(folder):
        assert remove_dead(parent, older_than_s=0) == []
    assert remove_dead(parent, older_than_s=0) == [folder]


def test_a_folder_in_which_a_child_still_listens_stays(parent: Path):
    folder = made(parent, "pippin-a", "reward-0")
    with socket.socket(socket.AF_UNIX) as learner:
        learner.bind(str(folder / "learner"))
        learner.listen()
        assert remove_dead(parent, older_than_s=0) == []
    assert remove_dead(parent, older_than_s=0) == [folder]


def test_new_folders_others_and_files_stay(parent: Path):
    new, other, work = (made(parent, name) for name in ("pippin-new", "other", "pippin-bench-x"))
    (work / "figures.json").write_text("{}")
    (parent / "pippin-link").symlink_to(other)
    (parent / "pippin.toml").touch()
    assert remove_dead(parent) == []
    os.utime(new, (0, 0))
    assert remove_dead(parent) == [new]
    assert remove_dead(parent, older_than_s=0) == []
    assert len(list(parent.iterdir())) == 4


def test_the_folder_of_a_run_is_held_and_goes_with_it():
    with ipc_folder() as folder:
        os.utime(folder, (0, 0))
        assert folder not in remove_dead(folder.parent)
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
