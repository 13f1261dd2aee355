"""The limit on open files is raised, and importing mlx_lm does not lower it."""

import subprocess
import sys

PROGRAM = """
import resource
from launch.processes.open_files import keep_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 3000))
keep_open_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
import mlx_lm.utils
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print(*resource.getrlimit(resource.RLIMIT_CORE))
"""


def test_the_limit_is_raised_to_the_hard_one_and_stays_there():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert run.stdout.split("\n")[:3] == ["3000 3000", "3000 3000", "0 0"]
