"""A run folder has one learner at a time."""

import os
import subprocess
import sys

import pytest

from launch.processes.run_lock import hold_run_folder
from protocol.errors import ConfigError

HOLD = """
import sys
from pathlib import Path
from launch.processes.run_lock import hold_run_folder
with hold_run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_learner_is_refused_until_the_first_is_gone_even_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        words = rf"another learner \(process {other.pid}\) is working in this run folder"
        with pytest.raises(ConfigError, match=words), hold_run_folder(tmp_path):
            pass
        other.kill()
    with hold_run_folder(tmp_path):
        assert (tmp_path / "learner.pid").read_text() == f"{os.getpid()}\n"
    with hold_run_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["learner.pid"]
