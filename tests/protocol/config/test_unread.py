"""Keys that a run would not read are refused or named, and no key that it reads is."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest

from protocol.config.fields import Field, leaf_fields, without_none
from protocol.config.help import help_text
from protocol.config.load import load
from protocol.config.settings import GrpoRun, PairsRun, PreferenceRun, SftRun
from protocol.config.unread import READ_BY, TAKES, check_read, readers, unread, value_of
from protocol.errors import ConfigError

FLAGS = {
    SftRun: ["--model.path=m", "--data.path=d"],
    PreferenceRun: ["--model.path=m", "--data.path=d"],
    GrpoRun: ["--model.path=m", "--data.path=d", "--rewards.functions=a.py:f"],
    PairsRun: ["--model.path=m", "--data.path=d", "--rewards.functions=a.py:f"],
}
CHOICES = [(cls, field) for cls in FLAGS for field in leaf_fields(cls)]
NAMES = [f"{cls.__name__}-{field.path}" for cls, field in CHOICES]


def another(cls: Any, field: Field) -> Any:
    """Return a value of the field's type that is not its default."""
    inner, _ = without_none(field.annotation)
    default: Any = value_of(cls(), field.path)
    if get_origin(inner) is Literal:
        return next(choice for choice in get_args(inner) if choice != default)
    if get_origin(inner) is dict:
        return {"a": "b"}
    if get_origin(inner) is list:
        return [{str: "b.py:g", float: 0.5}[get_args(inner)[0]]]
    if inner is bool:
        return not default
    return "other" if inner is str else inner((default or 0) + 1)


def with_key(cls: Any, path: str, value: Any) -> Any:
    """Return settings of `cls` that set one key, as from a file, unchecked."""
    tree = value
    for name in reversed(path.split(".")):
        tree = {name: tree}
    return msgspec.convert(tree, cls)


HELP = {cls: help_text(cls, "usage") for cls in FLAGS}


@pytest.mark.parametrize(("cls", "field"), CHOICES, ids=NAMES)
def test_keys_that_a_program_never_reads_are_refused_and_others_not(cls: Any, field: Field):
    path, value = field.path, another(cls, field)
    flags = [flag for flag in FLAGS[cls] if not flag.startswith(f"--{path}=")]
    found = readers(cls, path)
    assert (f"--{path} " in HELP[cls]) == (found is None)
    if found is None:
        check_read(with_key(cls, path, value), {path})
        return
    for text in (to_text(value), to_text(value_of(cls(), path))):
        with pytest.raises(ConfigError, match=rf"{path} is read by .*: leave it out"):
            load(cls, None, [*flags, f"--{path}={text}"])
    run = with_key(cls, path, value)
    if TAKES.get(cls) in found[0]:
        check_read(run)
        assert f"{path}: without effect; nothing is trained here" in unread(run)
    else:
        with pytest.raises(ConfigError, match=rf"{path} is read by .*: leave it out"):
            check_read(run)


def to_text(value: Any) -> str:
    """Write a value as a flag does."""
    if isinstance(value, list):
        return msgspec.json.encode(value).decode()
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def test_the_table_names_keys_and_programs_that_there_are():
    for name, (programs, words) in READ_BY.items():
        paths = {
            field.path
            for cls in programs
            for field in leaf_fields(cls)
            if field.path == name or field.path.startswith(f"{name}.")
        }
        assert paths, name
        assert words
        others = {cls for cls in FLAGS if readers(cls, next(iter(paths))) is not None}
        assert others, f"{name} is read by all whose recipe holds it"


def test_recipes_of_another_program_are_refused(tmp_path: Path):
    path = tmp_path / "sft.toml"
    path.write_text('[model]\npath = "m"\n[data]\npath = "d"\noverlong_prompts = "error"\n')
    with pytest.raises(ConfigError, match=r"data\.overlong_prompts is read by .*on_bad_row"):
        load(SftRun, path)


def test_a_recipe_of_grpo_makes_pairs(tmp_path: Path):
    path = tmp_path / "grpo.toml"
    path.write_text("""
[model]
path = "m"
lora = {rank = 4}
[data]
path = "d"
eval_path = "e"
[rewards]
functions = ["a.py:f"]
[objective]
beta = 0.1
[optimizer]
learning_rate = 1e-5
[train]
max_steps = 9
gradient_checkpointing = true
[eval]
steps = 3
""")
    assert unread(load(GrpoRun, path)) == []
    assert unread(load(PairsRun, path)) == [
        "model.lora.rank, data.eval_path, objective.beta, optimizer.learning_rate, "
        "train.gradient_checkpointing, eval.steps: without effect; nothing is trained here"
    ]


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
def test_keys_that_other_settings_leave_unread_are_named(
    cls: Any, flags: list[str], said: list[str]
):
    assert unread(load(cls, None, [*FLAGS[cls], *flags])) == said


def test_one_recipe_trains_dpo_simpo_and_orpo(tmp_path: Path):
    shipped = Path(__file__).parents[3] / "launch/recipes/compare_preference.toml"
    text = shipped.read_text().replace("[model.lora]", '[model]\nreference = "base"\n[model.lora]')
    (tmp_path / "recipe.toml").write_text(text)
    for method, read in (("dpo", True), ("simpo", False), ("orpo", False)):
        flags = [*FLAGS[PreferenceRun], f"--objective.method={method}"]
        said = unread(load(PreferenceRun, tmp_path / "recipe.toml", flags))
        line = f"model.reference = base has no effect with {method}, without a reference"
        assert said == ([] if read else [line])
