"""Write a run's page: `launch/report.py RUN` makes RUN/report.html, one file that needs no network.

The page shows curves, sample completions with their rewards, and what went wrong on the way.
"""

import argparse
import sys
from pathlib import Path

from launch.pages.run_page import write_report


def main() -> int:
    """Write the report of the run named on the command line."""
    parser = argparse.ArgumentParser(description="Write RUN/report.html.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/latest")
    folder = parser.parse_args().run
    if not folder.is_dir():
        sys.stderr.write(f"{folder}: required a run folder, such as runs/latest; got none\n")
        return 2

    try:
        written = write_report(folder)
    except OSError as error:
        sys.stderr.write(f"{folder}: the report cannot be written: {error}\n")
        return 2

    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
