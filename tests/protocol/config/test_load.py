"""Recipes and flags: read, overridden, refused with the field's path and the nearest name."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.config.fields import extra, leaf_fields
from protocol.config.load import load, to_toml
from protocol.config.reference import help_text
from protocol.config.settings import PROGRAMS, GrpoRun, PairsRun, PreferenceRun, SftRun
from protocol.errors import ConfigError
from tests.protocol.config.recipes import FLAGS

GRPO = ["--model.path=m", "--data.path=d", "--rewards.functions=a.py:f"]
OFFLINE = ["--model.path", "m", "--data.path", "d"]


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "[model]\npath = 'm'\n[model.lora]\nrank = 4\n[data]\npath = 'd'\n"
        "[rewards]\nfunctions = ['a.py:f']\n[optimizer]\nlearning_rate = 1\n"
    )
    run = load(GrpoRun, recipe, ["--model.lora.rank", "8", "--queue.max_staleness=0"])
    assert run.model.lora.rank == 8
    assert run.model.lora.scale == 2.0
    assert run.queue.max_staleness == 0
    assert run.optimizer.learning_rate == 1.0
    assert run.sampling.num_generations == 8


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("--model.lora.keys=q_proj, v_proj", "model.lora.keys", ["q_proj", "v_proj"]),
        ("--model.lora.keys=none", "model.lora.keys", None),
        ("--rewards.functions=['a,b:f']", "rewards.functions", ["a,b:f"]),
        ("--rewards.reward_weights=0.5", "rewards.reward_weights", [0.5]),
        ("--data.columns=prompt=question,answer=a", "data.columns",
         {"prompt": "question", "answer": "a"}),
        ("--data.columns={prompt = 'q'}", "data.columns", {"prompt": "q"}),
        ("--data.max_prompt_length=none", "data.max_prompt_length", None),
        ("--train.max_steps=-1", "train.max_steps", -1),
        ("--eval.at_start=false", "eval.at_start", False),
        ("--model.quantize_bits=4", "model.quantize_bits", 4),
        ("--actors.max_concurrent_completions=7", "actors.max_concurrent_completions", 7),
        ("--actors.max_concurrent_completions=auto", "actors.max_concurrent_completions", "auto"),
        ("--optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("--data.system_prompt=a=b --c", "data.system_prompt", "a=b --c"),
    ],
)  # fmt: skip
def test_flag_values(flag: str, path: str, value: object):
    got: object = load(GrpoRun, None, [*GRPO, flag])
    for name in path.split("."):
        got = getattr(got, name)
    assert got == value


def test_a_run_keeps_the_defaults_that_it_sets_for_a_section(tmp_path: Path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[optimizer]\nwarmup_steps = 5\n")
    run = load(SftRun, recipe, OFFLINE)
    assert run.optimizer.warmup_steps == 5
    assert run.optimizer.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[samplng]\nbeta = 1", r"unknown section 'samplng'; did you mean 'sampling'\?"),
        (
            "[model.lora]\nrnak = 1",
            r"unknown key 'model.lora.rnak'; did you mean 'model.lora.rank'",
        ),
        (
            "[queue]\nzzzzzzzzzzzzzzz = 1",
            "unknown key 'queue.zzzzzzzzzzzzzzz'; valid here: queue.max_staleness, ",
        ),
        ("[zzzz]\nqqqq = 1", "unknown section 'zzzz'; valid here: run, model, data, rewards"),
        ("[train]\nbatch_size = 'x'", "train.batch_size must be int, got 'x'"),
        ("[model]\nfine_tune_type = 'lore'", r"must be lora\|dora\|full, got 'lore'"),
        ("train = 3", r"\[train\] is a section of keys, not 3"),
        ("[optimizer]\nlearning_rate = nan", "must be a finite float, got nan"),
        ("[run", "is not valid TOML"),
        ("[run]\nseed = true", "run.seed must be int, got True"),
    ],
)
def test_bad_files_are_refused_with_path_and_nearest_name(tmp_path: Path, toml: str, message: str):
    recipe = tmp_path / "bad.toml"
    recipe.write_text(toml)
    with pytest.raises(ConfigError, match=message) as caught:
        load(GrpoRun, recipe, GRPO)
    assert str(recipe) in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampling.beta", "1"], r"unknown key --sampling.beta; did you mean 'objective.beta'"),
        (["--model.lora", "1"], "--model.lora is a section"),
        (["--run.seed"], "--run.seed needs a value"),
        (["recipe.toml"], "'recipe.toml' is not a flag"),
        (["--run.seed=1.5"], "--run.seed must be int, got '1.5'"),
        (["--run.seed", "9" * 30], r"run.seed must be in \[0, 4294967296\)"),
        (["--eval.at_start", "maybe"], "--eval.at_start must be bool, got 'maybe'"),
        (["--sampling.num_generations=1"], "sampling.num_generations must be at least 2.*got 1"),
        (["--rewards.reward_weights=1,2"], r"one weight for each of the 1 rewards.functions"),
        (["--rewards.functions="], "rewards.functions must name at least one"),
        (["--objective.epsilon=0"], "objective.epsilon must be positive, got 0"),
        (["--objective.beta=-1"], "objective.beta must be at least 0"),
        (["--objective.delta=1.1"], r"objective.delta must exceed 1 \+ epsilon_high \(1.2\)"),
        (["--objective.importance_sampling_correction=true"], 'old_logprobs = "recompute"'),
        (["--transport.bind=tcp://0.0.0.0:5"], "not a loopback address and needs transport.keys"),
        (["--transport.bind=ipc:///x"], "must be tcp://host:port"),
        (["--actors.count=0"], "unless transport.bind"),
        (["--actors.count=2", "--actors.colocate=true"], "actors.count must be 1 with .*got 2"),
        (["--actors.devices=0", "--actors.colocate=true"], "must be none .* train.device says"),
        (["--eval.steps=5"], "eval.steps needs data.eval_path"),
        (["--data.streaming=true"], "train.max_steps must be set with data.streaming"),
        (["--train.shared_prompt=on", "--train.micro_batch_size=2"], "different prompts"),
        (["--queue.lease_s=1"], "more than twice actors.heartbeat_s"),
        (["--queue.max_lease_s=100"], r"more than queue.lease_s \(120\)"),
        (["--rewards.reward_timeout_s=4000"], "queue.max_lease_s"),
        (["--train.max_steps=0"], "--train.max_steps must be -1 or at least 1, got 0"),
        (
            ["--actors.max_concurrent_completions=0"],
            "--actors.max_concurrent_completions must be at least 1, got 0",
        ),
        (
            ["--actors.max_concurrent_completions=all"],
            r"--actors.max_concurrent_completions must be int\|auto, got 'all'",
        ),
        (
            ["--model.lora.num_layers=-2"],
            "--model.lora.num_layers must be -1 or at least 1, got -2",
        ),
        (["--model.lora.keys="], r"--model.lora.keys must be none or non-empty, got \[\]"),
        (["--model.lora.dropout=1"], r"--model.lora.dropout must be in \[0, 1\), got 1"),
        (["--model.quantize_group_size=48"], r"must be 32\|64\|128, got '48'"),
        (["--data.max_rows=0"], "--data.max_rows must be none or at least 1, got 0"),
        (["--sampling.top_p=0"], r"--sampling.top_p must be in \(0, 1\], got 0"),
        (["--sampling.min_p=1.5"], r"--sampling.min_p must be none or in \[0, 1\], got 1.5"),
        (["--sampling.temperature=0"], "must be positive, got 0.*training has to sample"),
        (["--objective.importance_sampling_clip_min=4"], r"must be at most .* \(3\), got 4"),
        (["--run.name=a/b"], "run.name must be a folder's name without '/', got 'a/b'"),
        (["--run.log_completions=-2"], "--run.log_completions must be at least -1, got -2"),
        (
            ["--model.path="],
            "model.path must be non-empty, got ''. The model: a local folder",
        ),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load(GrpoRun, None, [*GRPO, *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective.loss_type=sigmoid,sft", "--objective.loss_weights=1"], "each of the 2"),
        (["--objective.loss_type=sigmod"], "must be of sigmoid.*; did you mean 'sigmoid'"),
        (["--data.order=shufled"], "got 'shufled'; did you mean 'shuffled'"),
        (["--eval.generate=true"], "eval.generate needs data.eval_path"),
        (["--objective.method=orpo", "--objective.loss_type=ipo"], "is not used"),
        (["--objective.beta=0"], "objective.beta must be positive"),
        (["--train.shared_prompt=off"], "key --train.shared_prompt: launch/grpo.py reads it"),
    ],
)
def test_preference_clashes_are_refused(flags: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load(PreferenceRun, None, [*OFFLINE, *flags])


def test_toml_round_trips_with_none_lists_tables_and_odd_strings(tmp_path: Path):
    run = load(GrpoRun, None, [
        *GRPO, "--data.system_prompt=a \"b\"\\\n\x7f\u2028é", "--data.max_rows=none",
        "--data.columns=prompt=my question", "--rewards.reward_weights=1e-30",
        "--model.lora.keys=q,v", "--objective.epsilon_high=0.28",
    ])  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(to_toml(run), encoding="utf-8")
    assert load(GrpoRun, path) == run


@pytest.mark.parametrize("cls", PROGRAMS)
def test_every_programs_settings_round_trip(cls: Any, tmp_path: Path):
    flags = ["--data.columns=prompt=my question", "--data.name=none", "--train.num_train_epochs=2"]
    run = load(cls, None, [*FLAGS[cls], *flags])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(run), encoding="utf-8")
    assert load(cls, path) == run
    assert set(tomllib.loads(path.read_text())) == set(cls.__struct_fields__)


def test_paths_are_marked_by_their_types():
    marked = {
        path
        for cls in PROGRAMS
        for path, field in leaf_fields(cls).items()
        if extra(field.annotation, "path")
    }
    assert marked == {
        "model.path", "model.adapter_path", "model.chat_template", "model.reference", "data.path",
        "data.eval_path", "data.prepare", "rewards.functions", "transport.keys",
    }  # fmt: skip


@pytest.mark.parametrize("cls", [GrpoRun, PairsRun, PreferenceRun, SftRun])
def test_help_lists_every_key_with_type_default_bounds_and_meaning(cls: Any):
    text = help_text(cls, "launch/x.py")
    flat = " ".join(text.split())
    headings = [line for line in text.splitlines() if line.startswith("[")]
    assert len(headings) == len(set(headings))
    for path, field in leaf_fields(cls).items():
        assert f"  --{path} {field.type_name} = " in text
        assert field.description in flat
    assert "  --run.seed int = 42  (in [0, 4294967296))" in text


@pytest.mark.parametrize("cls", PROGRAMS)
def test_every_program_has_a_json_schema(cls: Any):
    schema = msgspec.json.schema(cls)
    (seed,) = [
        section["properties"]["seed"]
        for section in schema["$defs"].values()
        if "seed" in section["properties"]
    ]
    assert seed == {
        "type": "integer",
        "minimum": 0,
        "exclusiveMaximum": 2**32,
        "default": 42,
        "description": leaf_fields(cls)["run.seed"].description,
    }


def test_configuration_loads_neither_mlx_nor_transformers():
    code = (
        "import sys, protocol.config.load, protocol.config.reference;"
        "print([m for m in ('mlx', 'mlx_lm', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
