"""Write what TRL computes on random inputs: `python tests/parity/make_goldens.py DIR`.

Runs TRL's own loss functions (trl 1.16.0, torch 2.13, float64, CPU), with a stand-in for the model
that hands over given log-probs; needs neither MLX nor this project. The format is run_goldens.py's.
"""

# pyright: reportMissingImports=false
import json
import sys
from pathlib import Path

import numpy as np
from grpo_goldens import grpo, grpo_masked, grpo_options
from preference_goldens import preference


def main(folder):
    """Write the files, with 9 significant digits: a hundredth of the bar."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20_26)
    makers = (grpo, preference, grpo_masked, grpo_options)
    for name, make in ((make.__name__, make) for make in makers):
        text = json.dumps(rounded(make(rng)), separators=(",", ":"))
        (folder / f"{name}.json").write_text(text + "\n")


def rounded(value):
    """Round every number of a tree to 9 significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/parity/make_goldens.py DIR")
    main(Path(sys.argv[1]))
