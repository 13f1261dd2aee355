"""Fuse a run's adapters into its base: `launch/export.py RUN_OR_ADAPTER OUT [--gguf] [--ollama]`.

RUN_OR_ADAPTER is a run's folder (its `adapters/` or `model/`; with --best the best evaluation's
checkpoint) or an adapter folder in mlx-lm's format. OUT becomes a model that mlx-lm loads. Notes
say what could not be converted; exit status 1: something that was asked for is missing.
"""

import argparse
import logging
import sys
from pathlib import Path

from launch.exporting.fuse import GGUF_NAME, export
from launch.processes.blas import load_openblas
from protocol.errors import PippinError

log = logging.getLogger("pippin.export")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_ADAPTER")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--model", default="", help="the base, if it has moved since")
    parser.add_argument("--best", action="store_true", help="the best evaluation's checkpoint")
    parser.add_argument("--dequantize", action="store_true", help="unpack a quantised base")
    parser.add_argument("--gguf", action="store_true", help=f"also write {GGUF_NAME}")
    parser.add_argument("--ollama", action="store_true", help="also write a Modelfile")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Export; print what was written, and notes on the rest."""
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    load_openblas()
    options = {k: v for k, v in vars(args).items() if k not in ("source", "out")}

    try:
        result = export(args.source, args.out, **options)
    except PippinError as error:
        log.error("%s: %s", type(error).__name__, error)
        return 1

    print(f"Model: {result.folder} (uv run mlx_lm.chat --model {result.folder})")
    for path in (result.gguf, result.modelfile):
        if path is not None:
            print(f"Also: {path}")
    for note in result.notes:
        print(f"Note: {note}")
    return int(result.failed)


if __name__ == "__main__":
    sys.exit(main())
