"""Hold the objectives to what TRL computed: `python tests/parity/run_goldens.py DIR`.

DIR holds JSON files of `make_goldens.py`'s format. Prints passed/total and each failure with both
values; exits 1 on a failure, an unknown key, a file of another format, or a folder without cases.

The bar is 1e-6 relative, 1e-7 absolute. TRL computed in float64, training computes in float32: a
case whose inputs make float32 lose more digits than that (a small difference of large numbers)
passes if it meets the bar in float64, and 1e-5 relative or 1e-6 absolute in float32; stderr names
it. What TRL itself computes in float32 (alpha divergence) is held to 1e-5 and 1e-6 there. Where
TRL's own value is inf or NaN, ours must be finite.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from protocol.errors import ConfigError
from tests.parity.golden_cases import Case, FormatError, cases_of

RELATIVE, ABSOLUTE = 1e-6, 1e-7
FLOAT32_BAR = 1e-5, 1e-6
SINGLE_BAR = 1e-5, 1e-6


def cases(folder: Path) -> Iterator[Case]:
    """Yield every case of a folder; raises FormatError for a file that holds none."""
    for path in sorted(folder.glob("*.json")):
        try:
            data = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"{path.name} is not JSON: {error}") from error
        yield from cases_of(data, path.name)


def difference(
    name: str, ours: Any, theirs: Any, relative: float = RELATIVE, absolute: float = ABSOLUTE
) -> str | None:
    """Return both values where they differ beyond the bar, or shapes that do; NaN is null."""
    if ours is None and theirs is not None:
        return f"ours is missing, TRL {theirs}"
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        return f"ours has shape {a.shape}, TRL {b.shape}"
    with np.errstate(invalid="ignore"):  # inf - inf
        near = np.abs(a - b) <= np.maximum(relative * np.abs(b), absolute)
    # A metric may have no value where TRL's has none; a loss or a gradient may not.
    valueless = np.isnan(b) & (name not in ("loss", "grad", "losses"))
    limit = np.where(valueless, np.isnan(a), np.isfinite(a))
    bad = ~np.where(np.isfinite(b), near, limit)
    if not bad.any():
        return None
    at = tuple(np.argwhere(bad)[0])
    return f"ours {a[at]:.9g}, TRL {b[at]:.9g} at {tuple(map(int, at))} ({bad.sum()} of {bad.size})"


def check(case: Case) -> tuple[list[str], list[str]]:
    """Return the faults of a case, and what only rounding keeps beyond the bar."""
    found = list(case.evaluate(mx.float32))
    missed = [f"{name}: {t}" for name, a, b in found if (t := difference(name, a, b))]
    if not missed or any(difference(name, a, b, *FLOAT32_BAR) for name, a, b in found):
        return missed, []
    bar = SINGLE_BAR if case.single else (RELATIVE, ABSOLUTE)
    with mx.stream(mx.cpu):  # GPUs have no float64
        precise = list(case.evaluate(mx.float64))
    faults = [
        f"{name} in float64: {t}" for name, a, b in precise if (t := difference(name, a, b, *bar))
    ]
    return (missed + faults, []) if faults else ([], missed)


def main(folder: Path) -> int:
    """Check a folder; return the exit status."""
    passed = total = 0
    readable = True
    found = cases(folder)
    while True:
        try:
            case = next(found)
        except StopIteration:
            break
        except FormatError as error:
            print(f"{folder}: {error}", file=sys.stderr)
            readable = False
            break
        total += 1
        try:
            faults, rounding = check(case)
        except (FormatError, ConfigError, KeyError, TypeError, ValueError) as error:
            faults, rounding = [f"{type(error).__name__}: {error}"], []
        passed += not faults
        for line in faults:
            print(f"FAIL {case.where}: {line}")
        for line in rounding:
            print(f"within the bar but for rounding: {case.where}: {line}", file=sys.stderr)
    print(f"{passed}/{total}")
    if not total and readable:
        print(f"{folder} has no cases: JSON files of TRL's losses are required", file=sys.stderr)
    return 0 if readable and total and passed == total else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/parity/run_goldens.py DIR")
    sys.exit(main(Path(sys.argv[1])))
