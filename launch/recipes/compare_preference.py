"""Train DPO, SimPO and ORPO on the same pairs and compare them.

`compare_preference.py --model.path MODEL --data.path PAIRS [--reward FUNCTION] [--out FILE]
[--section.key value …]`: each flag of launch/preference.py goes to all three runs.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from launch.compare import main as compare

RECIPE = Path(__file__).with_suffix(".toml")
PROGRAM = RECIPE.parents[1] / "preference.py"
# SimPO's beta multiplies a mean over tokens, not a sum: its paper takes 2 to 10, with gamma 0.3 to
# 1.6; DPO and ORPO have TRL's defaults.
METHODS: dict[str, dict[str, str]] = {
    "dpo": {"objective.beta": "0.1"},
    "simpo": {"objective.beta": "2.0", "objective.simpo_gamma": "1.0"},
    "orpo": {"objective.beta": "0.1"},
}


def main(argv: list[str] | None = None) -> int:
    """Run the three one after the other, then write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reward", default="", help="for win rates: file.py:function")
    parser.add_argument("--out", default="comparison.html")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    args, flags = parser.parse_known_args(argv)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folders: list[str] = []
    for method, settings in METHODS.items():
        name = f"{method}-{stamp}"
        own = [word for key, value in settings.items() for word in (f"--{key}", value)]
        command = [sys.executable, str(PROGRAM), str(RECIPE), "--objective.method", method, *own]
        command += ["--run.name", name, "--run.dir", str(args.runs), *flags]
        status = subprocess.run(command, check=False).returncode
        if status != 0:
            return status
        folders.append(str(args.runs / name))
    reward = ["--reward", args.reward] if args.reward else []
    return compare([*folders, "--out", args.out, *reward])


if __name__ == "__main__":
    raise SystemExit(main())
