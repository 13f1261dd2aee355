"""Keys that a program lacks are refused, naming who has them or what they are called now."""

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.config.fields import leaf_fields
from protocol.config.load import load, to_toml
from protocol.config.reference import help_text
from protocol.config.settings import PROGRAMS, GrpoRun, PairsRun, PreferenceRun, SftRun
from protocol.config.unknown_keys import INSTEAD, RENAMED
from protocol.errors import ConfigError
from tests.protocol.config.recipes import FLAGS

ALL = {path: field for cls in PROGRAMS for path, field in leaf_fields(cls).items()}
FOREIGN = [(cls, path) for cls in PROGRAMS for path in ALL if path not in leaf_fields(cls)]
NAMES = [f"{cls.__name__}-{path}" for cls, path in FOREIGN]
GRPO_RECIPE = """
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
"""


def to_text(value: Any) -> str:
    """Write a value as a flag does."""
    if isinstance(value, list):
        return msgspec.json.encode(value).decode()
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(("cls", "path"), FOREIGN, ids=NAMES)
def test_keys_of_other_programs_are_refused_in_flags_and_files(cls: Any, path: str, tmp_path: Path):
    readers = [name for other, name in PROGRAMS.items() if path in leaf_fields(other)]
    assert readers
    verb = "reads" if len(readers) == 1 else "read"
    words = f"{' and '.join(readers)} {verb} it; "
    value = ALL[path].default
    assert f"--{path} " not in help_text(cls, "usage")
    with pytest.raises(ConfigError) as caught:
        load(cls, None, [*FLAGS[cls], f"--{path}={to_text(value)}"])
    assert str(caught.value).startswith(f"unknown key --{path}: {words}")

    recipe = tmp_path / "r.toml"
    section, _, name = path.rpartition(".")
    written = to_toml(ALL[path].owner()).splitlines()
    line = next(line for line in written if line.startswith(f"{name} = "))
    recipe.write_text(f"[{section}]\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load(cls, recipe, FLAGS[cls])
    assert str(caught.value).startswith(f"{recipe}: unknown key {path!r}: {words}")


@pytest.mark.parametrize(
    ("cls", "path", "said"),
    [
        (
            SftRun,
            "data.max_prompt_length",
            "launch/grpo.py and launch/pairs.py read it; here data.max_length counts the prompt",
        ),
        (GrpoRun, "eval.generate", "read it; here eval.steps always samples answers"),
        (PairsRun, "eval.generate", "read it; leave it out"),
        (PreferenceRun, "train.shared_prompt", "launch/grpo.py reads it; leave it out"),
    ],
)
def test_what_does_the_same_is_named(cls: Any, path: str, said: str):
    with pytest.raises(ConfigError) as caught:
        load(cls, None, [f"--{path}={to_text(ALL[path].default)}"])
    assert str(caught.value).endswith(said)


def test_the_tables_name_keys_that_there_are():
    assert {key for pair in INSTEAD.items() for key in (pair[0], pair[1][0])} <= ALL.keys()
    assert set(RENAMED.values()) <= ALL.keys()
    assert not RENAMED.keys() & ALL.keys()


def test_renamed_keys_are_refused_with_the_new_name(tmp_path: Path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[actors]\nmax_rows = 8\n")
    for cls in (GrpoRun, PairsRun):
        with pytest.raises(ConfigError) as caught:
            load(cls, recipe, FLAGS[cls])
        assert str(caught.value) == (
            f"{recipe}: actors.max_rows is now actors.max_concurrent_completions"
        )
        with pytest.raises(ConfigError) as caught:
            load(cls, None, [*FLAGS[cls], "--actors.max_rows=8"])
        assert str(caught.value) == ("--actors.max_rows is now --actors.max_concurrent_completions")


def test_a_recipe_of_grpo_makes_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "grpo.toml"
    path.write_text(GRPO_RECIPE)
    with caplog.at_level(logging.WARNING):
        load(GrpoRun, path)
        assert not caplog.messages
        run = load(PairsRun, path, also_accepts=GrpoRun)
    assert caplog.messages == [
        "model.lora.rank, data.eval_path, objective.beta, optimizer.learning_rate, "
        "train.gradient_checkpointing, eval.steps: not read by launch/pairs.py, left out"
    ]
    assert run.train.max_steps == 9
    (tmp_path / "config.toml").write_text(to_toml(run))
    assert load(PairsRun, tmp_path / "config.toml") == run


def test_keys_that_are_left_out_are_checked_and_are_those_of_the_file_alone(tmp_path: Path):
    path = tmp_path / "grpo.toml"
    with pytest.raises(ConfigError, match=r"unknown key --objective\.beta: launch/grpo\.py"):
        load(PairsRun, None, ["--objective.beta=1"], also_accepts=GrpoRun)
    path.write_text("[objective]\nbeta = -1.0\n")
    with pytest.raises(ConfigError, match=r"grpo\.toml: objective\.beta must be at least 0"):
        load(PairsRun, path, FLAGS[PairsRun], also_accepts=GrpoRun)
    path.write_text("[eval]\ngenerate = true\n")
    with pytest.raises(ConfigError, match=r"unknown key 'eval\.generate'.*leave it out"):
        load(PairsRun, path, FLAGS[PairsRun], also_accepts=GrpoRun)
