"""How bfloat16 weights move in full fine-tuning at a small learning rate, compared with float32.

    python tests/benchmarks/master_weights.py [--model FOLDER] [--data FILE] [--steps 200]

Trains the three ways of movements.py side by side. Each line shows, after the given number of
steps: the norm of float32's movement from the start over all tensors; for both bfloat16 ways the
norm relative to that (for the learner's way, of its masters), the cosine with it, and the share of
weights that differ from the start; and by how much the loss of held-out rows fell. The last line is
JSON with the training losses of every step. Data: a JSONL file of messages, text, or prompt and
completion; by default additions, which take 29 tokens with the embedded model and up to 64 with
chat templates that have a system prompt (--length 64).
"""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.processes.blas import HINT, load_openblas

if TYPE_CHECKING:
    from tests.benchmarks.movements import Row, Way

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "launch/models/addition"
ADDITIONS = f"{ROOT}/launch/recipes/addition.py:sft_rows"
HEADER = """\
       float32    bfloat16, learner's       bfloat16, naive           held-out loss fell by
 step  |moved|    ratio  cosine  changed    ratio  cosine  changed    float32    masters    \
bfloat16   naive"""


def main() -> None:
    """Read the options, train, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder in mlx-lm's format")
    parser.add_argument("--data", default=ADDITIONS, help="JSONL, or file.py:function")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument(
        "--length", type=int, default=32, help="tokens per row; longer rows are cut"
    )
    parser.add_argument("--rate", type=float, default=1e-6)
    parser.add_argument("--every", type=int, default=20, help="steps between lines")
    options = parser.parse_args()
    if not load_openblas():
        print(HINT)

    from tests.benchmarks.movements import Plan, compare

    began = time.perf_counter()
    ways: dict[str, Way] = {}

    print(HEADER)
    for row in compare(Plan(**vars(options)), ways.update):
        print(line(row), flush=True)

    curves = {name: [round(loss, 5) for loss in way.losses] for name, way in ways.items()}
    print(json.dumps({"seconds": round(time.perf_counter() - began, 1), "losses": curves}))


def line(row: "Row") -> str:
    """Return a line of the table."""
    cells = [f"{row.step:5d}  {row.movements['float32'].norm:.3e}"]
    for name in ("bfloat16", "naive"):
        movement = row.movements[name]
        cells.append(f"{movement.ratio:.4f}  {movement.cosine:.4f}  {movement.moved:7.2%}")
    cells.append(
        "  ".join(f"{row.gains[name]:+.2e}" for name in ("float32", "masters", "bfloat16", "naive"))
    )
    return "    ".join(cells)


if __name__ == "__main__":
    main()
