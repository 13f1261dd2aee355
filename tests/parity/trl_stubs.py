"""What the makers of loss goldens share: stand-ins for what TRL's trainers hold (TRL 1.16.0)."""

# pyright: reportMissingImports=false
from types import SimpleNamespace

import numpy as np
import torch

ONE = SimpleNamespace(
    num_processes=1, device="cpu", sync_gradients=True, gather=lambda x: x,
    gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x,
    pad_across_processes=lambda x, dim, pad_index: x,
)  # fmt: skip


def tensor(values):
    """Return float64."""
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def last(metrics):
    """Return the metrics that a trainer logged, null for NaN."""
    values = {name: float(value[-1]) for name, value in metrics["train"].items()}
    return {name: None if value != value else value for name, value in values.items()}
