"""Replay TRL's recorded runs through the learner: `run_curves.py DIR [RUN ...]`.

DIR holds the runs (JSON and safetensors, `init_lora.safetensors`); `make_curves.py` writes such a
folder. `--model`: by default DIR/model, else DIR/../../models/NAME, of DIR's name. `--head`: by
default "full", for TRL computes all logits too. Prints, a run, the root-mean-square difference of
the curves of loss and gradient norm, of the final tensors relative to the update, and the largest
difference of a metric, relative from 1 on; then passed/total. Exits 1 on any failure or where
nothing ran.

What is left is rounding: in AdamW's first steps an entry whose gradient is below it moves by up to
the learning rate either way. Of IPO's difference in the final tensors one number in 58,368 makes
99%, whose first gradient is 2e-8 of a norm of 52. TRL's own float32 curves are up to 2.7e-5 from
the same run in float64. Sums in another order (OpenBLAS, the chunked head) turn such entries
differently: `dpo_ipo` and `fullft_sft_completion` may then miss.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from learner.losses.metrics import finish_metrics, merge_metrics
from learner.model.logprobs import Head
from learner.model.reference import make_reference
from learner.optim.step import Step
from protocol.config.settings import LoraSettings, OptimizerSettings, PolicySettings, TrainSettings
from protocol.model.adapters import save_adapters
from protocol.model.policy import LoadedPolicy, load_policy
from protocol.model.snapshots import trainable
from tests.parity.curves import OldLogps, Recording, micro_batches, objective_of, read

LOSS_BAR, NORM_BAR, FINAL_BAR = 1e-5, 3e-4, 5e-4
IPO_LOSS_BAR = 3e-5  # the loss itself is near 25
FULL_BETA_BAR = 1e-4  # relative, of full fine-tuning with beta 0.04
METRIC_BAR = 1e-4
METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
OPTIMIZER_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip
SIDES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}


@dataclass(frozen=True)
class Outcome:
    """Differences of one run, whether they are within the bars, and our losses by step."""

    loss: float
    norm: float
    final: float
    metric: float
    passed: bool
    losses: list[float]


def own_name(name: str) -> str:
    """Return our name of a tensor of PEFT or Transformers."""
    for theirs, ours in SIDES.items():
        name = name.replace(theirs, ours)
    return name


def ours(name: str, array: mx.array) -> mx.array:
    """Return a tensor in our layout: mlx-lm keeps adapters transposed."""
    return array.T if "lora_" in name else array


def settings_of(recording: Recording, model: Path) -> PolicySettings:
    """Return model settings with the run's kind of training and its reference."""
    if recording.data["lora"] is None:
        return PolicySettings(path=str(model), fine_tune_type="full", dtype="float32")
    lora = recording.data["lora"]
    reference = "initial" if "initial adapter" in lora["reference"] else "base"
    shape = LoraSettings(rank=lora["r"], scale=lora["scale"])
    return PolicySettings(path=str(model), lora=shape, dtype="float32", reference=reference)


def start(
    recording: Recording, settings: PolicySettings, folder: Path, initial: Path
) -> tuple[LoadedPolicy, PolicySettings]:
    """Load the policy, from the recorded initial adapter where adapters are trained."""
    policy = load_policy(settings, seed=0)
    if recording.data["lora"] is None:
        return policy, settings
    loaded = mx.load(str(initial))
    assert isinstance(loaded, dict)
    named = {own_name(name): ours(name, array) for name, array in loaded.items()}
    if named.keys() != trainable(policy.model).keys():
        raise ValueError(f"{initial} does not name the trainable tensors: {sorted(named)[:3]}")
    policy.model.update(tree_unflatten(list(named.items())))
    save_adapters(folder, policy.model, policy.adapter_config, settings.path)
    settings = PolicySettings(
        path=settings.path, adapter_path=str(folder), dtype="float32", reference=settings.reference
    )
    return load_policy(settings, seed=0), settings


def final_difference(
    recording: Recording, before: dict[str, mx.array], after: dict[str, mx.array]
) -> float:
    """Return |ours - TRL's| / |TRL's - initial| over all tensors (or the recorded samples)."""
    error = size = 0.0
    for name in recording.data["tensor_names"]:
        own = own_name(name)
        first, last = (np.array(ours(name, tree[own]), np.float64) for tree in (before, after))
        if f"final.{name}" in recording.arrays:
            theirs = np.array(recording.arrays[f"final.{name}"], np.float64)
        else:
            theirs = np.array(recording.arrays[f"final_sample.{name}"], np.float64)
            size_of, n = len(theirs), first.size
            picked = np.arange(n) if n <= 512 else (np.arange(512) * n) // 512
            assert len(picked) == size_of
            first, last = first.ravel()[picked], last.ravel()[picked]
        error += float(((last - theirs) ** 2).sum())
        size += float(((theirs - first) ** 2).sum())
    return (error / size) ** 0.5


def replay(
    path: Path, model: Path, *, head: Head, changes: Mapping[str, Any] | None = None
) -> Outcome:
    """Train one recorded run again and compare; `changes` are arguments to set otherwise."""
    recording = read(path, changes or {})
    with tempfile.TemporaryDirectory() as folder:
        initial = path.parent / "init_lora.safetensors"
        settings = settings_of(recording, model)
        policy, settings = start(recording, settings, Path(folder), initial)
        reference = None
        if reads_reference(recording):
            reference = make_reference(policy, settings).model
    steps = recording.data["steps"]
    rows = recording.arguments["per_device_train_batch_size"]
    train = TrainSettings(
        batch_size=rows * len(steps[0]["micro"]), micro_batch_size=rows, head=head
    )
    objective = objective_of(recording, policy.model, reference, train)
    updater = Step(policy.model, optimizer_of(recording), total_steps=len(steps), compiled=False)
    before = trainable(policy.model)
    losses: list[float] = []
    norms: list[float] = []
    metric = 0.0
    old: OldLogps = {}
    for step in steps:
        micro = micro_batches(recording, step, objective, old)
        parts = [updater.accumulate(arrays, objective.loss) for arrays in micro]
        losses.append(sum(float(np.array(loss)) for loss, _ in parts))
        norms.append(updater.apply().grad_norm)
        metrics = finish_metrics(reduce(merge_metrics, (found for _, found in parts)))
        metric = max(metric, metric_difference(recording, step, metrics))
    theirs = [[step[name] for step in steps] for name in ("loss", "grad_norm")]
    final = final_difference(recording, before, trainable(policy.model))
    return judge(path.stem, np.array([losses, norms]), np.array(theirs), final, metric)


def metric_difference(
    recording: Recording, step: dict[str, Any], metrics: Mapping[str, float]
) -> float:
    """Return the largest difference of a metric that TRL averages over the same tokens as we do.

    It averages micro-batches, we their tokens; ORPO and CPO take prompts and padding into `logits`.
    """
    same = recording.trainer in ("SFTTrainer", "DPOTrainer", "KTOTrainer")
    if not same or len(step["micro"]) > 1:
        return 0.0
    theirs = {name: value for name, value in step["logs"].items() if name in METRICS}
    gaps = [abs(metrics[name] - value) / max(abs(value), 1.0) for name, value in theirs.items()]
    return max(gaps)


def optimizer_of(recording: Recording) -> OptimizerSettings:
    """Return the optimiser's settings: TRL's names are ours."""
    given = recording.arguments
    # Not converted, so unchecked: tests set what a recipe could not, such as max_grad_norm = 0.
    return OptimizerSettings(**{name: given[name] for name in OPTIMIZER_ARGUMENTS})


def reads_reference(recording: Recording) -> bool:
    """Return whether the run's loss reads a reference policy."""
    if recording.trainer == "GRPOTrainer":
        return recording.arguments["beta"] > 0
    return recording.trainer in ("DPOTrainer", "KTOTrainer")


def judge(
    name: str, curves: np.ndarray, theirs: np.ndarray, final: float, metric: float
) -> Outcome:
    """Compare the (2, steps) curves of loss and gradient norm, and the rest, with the bars."""
    loss, norm = np.sqrt(((curves - theirs) ** 2).mean(axis=1)).tolist()
    loss_bar, norm_bar = (IPO_LOSS_BAR if "ipo" in name else LOSS_BAR), NORM_BAR
    sizes = np.sqrt((theirs**2).mean(axis=1)).tolist()
    if name.startswith("fullft") and "beta0.04" in name:
        loss_bar, norm_bar = FULL_BETA_BAR * sizes[0], FULL_BETA_BAR * sizes[1]
    within = loss <= loss_bar and norm <= norm_bar and final <= FINAL_BAR
    within = within and metric <= METRIC_BAR
    return Outcome(loss, norm, final, metric, within, curves[0].tolist())


def model_of(folder: Path) -> Path:
    """Return the model of a folder of runs: in it, or beside it under `models`."""
    inside = folder / "model"
    beside = folder.resolve().parents[1] / "models" / folder.resolve().name
    return inside if inside.is_dir() else beside


def main(folder: Path, model: Path, wanted: list[str], head: Head) -> int:
    """Replay the runs of a folder; return the exit status."""
    paths = [
        path
        for path in sorted(folder.glob("*.json"))
        if path.with_suffix(".safetensors").is_file() and (not wanted or path.stem in wanted)
    ]
    outcomes: list[Outcome] = []
    print(f"{'run':44} loss      grad_norm final     metric")
    for path in paths:
        outcome = replay(path, model, head=head)
        outcomes.append(outcome)
        figures = (
            f"{outcome.loss:.2e}  {outcome.norm:.2e}  {outcome.final:.2e}  {outcome.metric:.2e}"
        )
        print(f"{path.stem:44} {figures}{'' if outcome.passed else '  FAIL'}", flush=True)
    passed = sum(outcome.passed for outcome in outcomes)
    print(f"{passed}/{len(outcomes)}")
    return 0 if outcomes and passed == len(outcomes) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--head", choices=["full", "chunked"], default="full")
    parser.add_argument("runs", nargs="*")
    args = parser.parse_args()
    sys.exit(main(args.folder, args.model or model_of(args.folder), args.runs, args.head))
