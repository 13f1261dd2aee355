"""Keys that a run would not read are refused or named, and no key that it reads is."""

from typing import Any

import pytest

from protocol.config import load
from protocol.errors import ConfigError
from protocol.settings import GrpoRun, PairsRun, PreferenceRun, SftRun
from protocol.unread import READ_BY, unread, value_of

FLAGS = {
    SftRun: ["--model.path=m", "--data.path=d"],
    PreferenceRun: ["--model.path=m", "--data.path=d"],
    GrpoRun: ["--model.path=m", "--data.path=d", "--rewards.functions=a.py:f"],
    PairsRun: ["--model.path=m", "--data.path=d", "--rewards.functions=a.py:f"],
}
CHANGED = {
    "run.log_completions": "7",
    "data.max_prompt_length": "64",
    "data.overlong_prompts": "error",
    "train.shared_prompt": "off",
    "data.max_length": "64",
    "data.truncation_mode": "keep_end",
    "eval.batch_size": "7",
    "eval.generate": "true",
    "model.reference": "base",
}


@pytest.mark.parametrize("cls", FLAGS)
@pytest.mark.parametrize("path", READ_BY)
def test_keys_of_other_programs_are_refused(cls: Any, path: str):
    flags = [*FLAGS[cls], "--data.eval_rows=2", f"--{path}={CHANGED[path]}"]
    programs: Any = READ_BY[path][0]
    if issubclass(cls, programs):
        run = load(cls, None, flags)
        assert value_of(run, path) != value_of(cls(), path)
    else:
        with pytest.raises(ConfigError, match=rf"{path} is read by .*: leave it out"):
            load(cls, None, flags)


@pytest.mark.parametrize(
    ("cls", "flags", "said"),
    [
        (SftRun, [], []),
        (
            SftRun,
            ["--data.shuffle_buffer=7"],
            ["data.shuffle_buffer = 7 has no effect without data.streaming"],
        ),
        (SftRun, ["--data.shuffle_buffer=7", "--data.streaming=true", "--train.max_steps=1"], []),
        (SftRun, ["--model.quantize_group_size=32", "--model.quantize_bits=4"], []),
        (
            SftRun,
            ["--model.fine_tune_type=full", "--model.lora.rank=4"],
            ['model.lora.rank = 4 has no effect with model.fine_tune_type = "full"'],
        ),
        (
            SftRun,
            ["--train.num_train_epochs=3", "--train.max_steps=3"],
            ["train.num_train_epochs = 3.0 has no effect with train.max_steps, which ends the run"],
        ),
        (
            PreferenceRun,
            ["--objective.method=orpo", "--model.reference=base"],
            ["model.reference = base has no effect with orpo, without a reference"],
        ),
        (PreferenceRun, ["--model.reference=base"], []),
        (
            PreferenceRun,
            ["--eval.max_completion_length=9", "--data.eval_rows=2"],
            ["eval.max_completion_length = 9 has no effect without eval.generate"],
        ),
        (
            GrpoRun,
            ["--objective.sapo_temperature_pos=2", "--model.reference=base"],
            [
                "model.reference = base has no effect with objective.beta = 0",
                "objective.sapo_temperature_pos = 2.0 has no effect without "
                'objective.loss_type = "sapo"',
            ],
        ),
        (GrpoRun, ["--objective.sapo_temperature_pos=2", "--objective.loss_type=sapo"], []),
    ],
)
def test_keys_that_other_settings_leave_unread_are_named(
    cls: Any, flags: list[str], said: list[str]
):
    assert unread(load(cls, None, [*FLAGS[cls], *flags])) == said
