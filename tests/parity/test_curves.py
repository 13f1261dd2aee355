"""TRL's own training runs, again through the learner: curves of loss and gradient norm, tensors."""

import json
import math
import subprocess
import sys
from pathlib import Path

import mlx.optimizers as optim
import numpy as np
import pytest

from launch.processes.blas import HINT
from learner.model.reference import make_reference
from protocol.config.settings import PolicySettings, TrainSettings
from protocol.model.policy import load_policy
from tests.parity.curves import advantages_of, micro_batches, objective_of, read
from tests.parity.run_curves import FINAL_BAR, LOSS_BAR, METRIC_BAR, NORM_BAR, main, replay

FOLDER = Path(__file__).parent / "curve_goldens"
RUNS = sorted(path.stem for path in FOLDER.glob("*.json"))
ABSENT = 77  # the exit status of a program that did not find OpenBLAS
GRPO = [name for name in RUNS if name.startswith("grpo")]


def run(name, **changes):
    return replay(FOLDER / f"{name}.json", FOLDER / "model", head="chunked", changes=changes)


def recorded(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_the_runs_are_what_is_to_be_shown():
    assert (LOSS_BAR, NORM_BAR, FINAL_BAR, METRIC_BAR) == (1e-5, 3e-4, 5e-4, 1e-4)
    shown = {(r["trainer"].rsplit(".", 1)[-1], len(r["steps"])) for r in map(recorded, RUNS)}
    trainers = ("SFTTrainer", "DPOTrainer", "ORPOTrainer", "CPOTrainer", "GRPOTrainer")
    assert shown == {(trainer, 8) for trainer in trainers}
    assert {r["versions"]["trl"] for r in map(recorded, RUNS)} == {"1.16.0"}
    losses = [recorded(name)["explicit_args"] for name in GRPO]
    pairs = {(given["loss_type"], given["beta"]) for given in losses}
    assert pairs == {(kind, beta) for kind in ("dapo", "grpo") for beta in (0.0, 0.04)}


@pytest.mark.parametrize("name", RUNS)
def test_the_learner_trains_as_trl(name):
    outcome = run(name)
    assert outcome.loss <= LOSS_BAR
    assert outcome.norm <= NORM_BAR
    assert outcome.final <= FINAL_BAR
    assert outcome.metric <= METRIC_BAR


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS serves MLX on Linux only")
def test_the_learner_trains_as_trl_on_openblas_with_the_plain_head():
    program = (
        "from launch.processes.blas import load_openblas\n"
        f"if not load_openblas(): raise SystemExit({ABSENT})\n"
        "from pathlib import Path; from tests.parity.run_curves import main\n"
        f"folder = Path({str(FOLDER)!r})\n"
        "raise SystemExit(main(folder, folder / 'model', [], 'full'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER.parents[2], capture_output=True, text=True
    )
    if done.returncode == ABSENT:
        pytest.skip(HINT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{len(RUNS)}/{len(RUNS)}\n")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sft", {"learning_rate": 1.01e-3}),
        ("sft", {"lr_scheduler_type": "linear"}),
        ("sft", {"weight_decay": 0.1}),
        ("sft", {"max_grad_norm": 0.0}),
        ("dpo_sigmoid", {"beta": 0.101}),
        ("orpo", {"beta": 0.101}),
        ("simpo_alpha0", {"simpo_gamma": 0.51}),
        ("grpo_dapo_beta0", {"temperature": 0.99}),
        ("grpo_dapo_beta0", {"loss_type": "grpo"}),
        ("grpo_grpo_beta0", {"scale_rewards": "none"}),
        ("grpo_grpo_beta0.04", {"beta": 0.041}),
        ("grpo_dapo_beta0.04", {"use_bias_correction_kl": False}),
        ("grpo_dapo_beta0.04_twice", {"epsilon": 0.25}),
    ],
)
def test_one_wrong_setting_is_noticed(name, changes):
    assert not run(name, **changes).passed


def test_adam_without_bias_correction_is_noticed(monkeypatch):
    monkeypatch.setattr("learner.optim.adamw.ExactAdamW", optim.AdamW)  # corrects on demand only
    outcome = run("sft")
    # The first update is sqrt(1 - 0.999) / (1 - 0.9) = 0.32 of the right one.
    assert outcome.final > 0.1
    assert not outcome.passed


def test_the_first_loss_of_dpo_is_ln_2():
    outcome = run("dpo_sigmoid_refadapter")
    assert outcome.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    theirs = recorded("dpo_sigmoid_refadapter")["steps"][0]["loss"]
    assert theirs == pytest.approx(math.log(2), abs=1e-6)


def test_the_first_loss_of_dpo_on_an_untrained_adapter_is_ln_2():
    settings = PolicySettings(path=str(FOLDER / "model"), dtype="float32")
    policy = load_policy(settings, seed=0)
    recording = read(FOLDER / "dpo_sigmoid.json", {})
    reference = make_reference(policy, settings).model
    train = TrainSettings(batch_size=4, micro_batch_size=4)
    objective = objective_of(recording, policy.model, reference, train)
    (arrays,) = micro_batches(recording, recording.data["steps"][0], objective, {})
    loss, _ = objective.loss(policy.model, arrays)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("name", GRPO)
def test_advantages_of_the_recorded_rewards(name):
    scale = recorded(name)["explicit_args"]["scale_rewards"]
    for step in recorded(name)["steps"]:
        theirs = [part["inputs"]["advantages"] for part in step["micro"]]
        assert np.allclose(advantages_of(step["micro"], scale), theirs, rtol=1e-6, atol=1e-6)


def test_the_program_counts_and_fails(capsys):
    assert main(FOLDER, FOLDER / "model", ["orpo"], "full") == 0
    assert capsys.readouterr().out.endswith("1/1\n")
    assert main(FOLDER, FOLDER / "model", ["no_such_run"], "full") == 1
