"""Recompute a run's staleness: `launch/staleness.py RUN_DIR [--max N]`.

Exit status 1: some token is staler than `queue.max_staleness` of RUN_DIR/config.toml (or N).
Exit status 2: the records cannot be read.
"""

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from launch.run_folder.staleness import measure
from protocol.config.settings import QueueSettings
from protocol.errors import ConfigError, DataError, PippinError


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--max", type=int, help="the bound; default: queue.max_staleness")
    args = parser.parse_args(argv)
    try:
        bound = _bound(args.run_dir) if args.max is None else args.max
        seen = measure(
            _lines(args.run_dir / "rollouts.jsonl"), _lines(args.run_dir / "metrics.jsonl")
        )
    except PippinError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    share = seen.overlap_s / seen.training_s if seen.training_s else 0.0
    print(f"groups {seen.groups}, spans {seen.spans}")
    print(f"staleness max {seen.max}, mean {seen.mean:.3f}, bound {bound}")
    print(
        f"sampling {seen.sampling_s:.1f} s, training {seen.training_s:.1f} s, "
        f"both at once {seen.overlap_s:.1f} s ({share:.0%} of training)"
    )
    return int(seen.max > bound)


def _bound(folder: Path) -> int:
    path = folder / "config.toml"
    try:
        queue = tomllib.loads(path.read_text(encoding="utf-8")).get("queue", {})
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; or give --max") from error
    return int(queue.get("max_staleness", QueueSettings().max_staleness))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} holds a line that is no JSON object: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
