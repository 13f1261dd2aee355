"""Keys that are set and that other settings make idle are named, and no others."""

from pathlib import Path
from typing import Any

import pytest

from protocol.config.idle import idle
from protocol.config.load import load
from protocol.config.settings import GrpoRun, PairsRun, PreferenceRun, SftRun
from tests.protocol.config.recipes import FLAGS


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
        (
            PairsRun,
            ["--pairs.mode=given", "--sampling.num_generations=3", "--model.adapter_path=a"],
            [
                'model.adapter_path = a has no effect with pairs.mode = "given", one answer of the '
                "bare model",
                'sampling.num_generations = 3 has no effect with pairs.mode = "given", one answer '
                "of the bare model",
            ],
        ),
        (
            PairsRun,
            ["--pairs.answer_column=a"],
            ['pairs.answer_column = a has no effect without pairs.mode = "given"'],
        ),
    ],
)
def test_keys_that_other_settings_make_idle_are_named(cls: Any, flags: list[str], said: list[str]):
    assert idle(load(cls, None, [*FLAGS[cls], *flags])) == said


def test_one_recipe_trains_dpo_simpo_and_orpo(tmp_path: Path):
    shipped = Path(__file__).parents[3] / "launch/recipes/compare_preference.toml"
    text = shipped.read_text().replace("[model.lora]", '[model]\nreference = "base"\n[model.lora]')
    (tmp_path / "recipe.toml").write_text(text)
    for method, read in (("dpo", True), ("simpo", False), ("orpo", False)):
        flags = [*FLAGS[PreferenceRun], f"--objective.method={method}"]
        said = idle(load(PreferenceRun, tmp_path / "recipe.toml", flags))
        line = f"model.reference = base has no effect with {method}, without a reference"
        assert said == ([] if read else [line])
