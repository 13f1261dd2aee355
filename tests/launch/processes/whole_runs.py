"""Whole GRPO runs in processes of their own, and what they leave in their folders."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from launch import grpo
from protocol.model.snapshots import tensors_digest


def launched(*flags: str) -> str:
    """Run launch/grpo.py to its end; return its output."""
    done = subprocess.run(
        [sys.executable, grpo.__file__, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of a JSONL file of a run."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def adapters(folder: Path) -> str:
    """Return the digest of the tensors of a run's adapters."""
    arrays = mx.load(str(folder / "adapters" / "adapters.safetensors"))
    assert isinstance(arrays, dict)
    return tensors_digest(arrays)
