"""Train DPO, SimPO and ORPO on the same pairs and compare them.

`compare_preference.py --model.path MODEL --data.path PAIRS [--reward FUNCTION] [--out FILE]
[--section.key value …]`: each flag of launch/preference.py goes to all three runs.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.compare import main as compare
from launch.processes.exit_status import STOPPED

RECIPE = Path(__file__).with_suffix(".toml")
PROGRAM = RECIPE.parents[1] / "preference.py"
# SimPO's beta multiplies a mean over tokens, not a sum: the SimPO paper uses beta 2 to 10 and gamma
# 0.3 to 1.6, without the likelihood term that cpo_alpha adds. DPO and ORPO use TRL's defaults.
METHODS: dict[str, dict[str, str]] = {
    "dpo": {"objective.beta": "0.1"},
    "simpo": {
        "objective.beta": "2.0",
        "objective.simpo_gamma": "1.0",
        "objective.cpo_alpha": "0.0",
    },
    "orpo": {"objective.beta": "0.1"},
}


def main(argv: list[str] | None = None) -> int:
    """Run the three methods one after the other, then write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reward", default="", help="for win rates: file.py:function")
    parser.add_argument("--out", default="comparison.html", help="(%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    args, flags = parser.parse_known_args(argv)
    stamp = time.strftime("%Y%m%d-%H%M%S")

    # Ctrl-C reaches the run as well, which stops after its step; we only take note of it.
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    folders: list[str] = []
    try:
        for method, settings in METHODS.items():
            run = {"run.name": f"{method}-{stamp}", "run.dir": str(args.runs)}
            own = {"objective.method": method, **settings, **run}
            command = [sys.executable, str(PROGRAM), str(RECIPE)]
            command += [word for key, value in own.items() for word in (f"--{key}", value)]
            status = subprocess.run([*command, *flags], check=False).returncode
            if status != 0 or interrupts:
                return status or STOPPED
            folders.append(str(args.runs / run["run.name"]))
    finally:
        signal.signal(signal.SIGINT, before)

    reward = ["--reward", args.reward] if args.reward else []
    return compare([*folders, "--out", args.out, *reward])


if __name__ == "__main__":
    raise SystemExit(main())
