"""Make the untrained model that `addition_sft.toml` trains: `addition_base.py FOLDER [--seed N]`.

It has the architecture and the tokenizer of launch/models/addition (Qwen3 with 624,448 parameters;
256 bytes and 6 special tokens), and random weights.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (mlx and mlx-lm are only partly typed)

import argparse
import json
import shutil
from pathlib import Path
from typing import cast

MODEL = Path(__file__).parents[1] / "models" / "addition"


def write_weights(folder: Path, seed: int) -> None:
    """Write random weights as Qwen3 starts: normal with deviation 0.02, and 1 for the norms."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen3 import Model, ModelArgs

    keys = iter(mx.random.split(mx.random.key(seed), 64))
    model = Model(ModelArgs.from_dict(json.loads((MODEL / "config.json").read_text())))
    weights = {
        name: mx.ones_like(value)
        if name.endswith("norm.weight")
        else 0.02 * mx.random.normal(value.shape, key=next(keys))
        for name, value in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def main() -> None:
    """Write configuration, tokenizer and weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    shutil.copytree(
        MODEL, args.folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
    )
    write_weights(args.folder, args.seed)


if __name__ == "__main__":
    main()
