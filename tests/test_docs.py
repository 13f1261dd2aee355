"""README, CONTRIBUTING and docs/ hold: recipes load, rows train, flags, files and links exist."""

import json
import re
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from actors.worker import as_answers
from launch.pages.followers import Sink
from learner.data.examples import SftExample, pairs
from learner.data.filter import Report
from learner.data.prompts import open_prompts
from learner.losses import grpo
from learner.losses.metrics import finish_metrics
from learner.objectives import methods
from protocol.config.fields import leaf_fields
from protocol.config.load import load
from protocol.config.objective_settings import GrpoSettings, PreferenceSettings
from protocol.config.settings import PROGRAMS, ExampleData, GrpoRun, PreferenceRun
from tests.parity import tiny_tokenizer
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
KEYS = {path for cls in PROGRAMS for path in leaf_fields(cls)}
SECTIONS = {path.rpartition(".")[0] for path in KEYS}
OTHER_PROGRAMS = {"--no-group", "--group", "--adapter-path", "--prompt"}  # of uv and mlx_lm
METRICS = {"learner/waiting_share"}  # looks like a file
FILES = {".json", ".jsonl", ".toml", ".md", ".py"}


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def rows(page: str) -> list[dict[str, Any]]:
    """Return the dataset rows in a page: lines that are JSON objects."""
    return [json.loads(line) for line in PAGES[page].splitlines() if line.startswith("{")]


def named(pattern: str) -> list[tuple[str, str]]:
    """Return (page, what the pattern captured) over all pages, each once."""
    return sorted({(page, found) for page, text in PAGES.items()
                   for found in re.findall(pattern, text)})  # fmt: skip


def keys_in(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the paths of a TOML table's keys; `data.columns` and its like are keys themselves."""
    for name, value in table.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path in SECTIONS:
            yield from keys_in(value, f"{path}.")
        else:
            yield path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Return the README's recipe, with its functions and rows beside it."""
    (tmp_path / "my.toml").write_text(blocks("README.md", "toml")[0])
    (tmp_path / "my.py").write_text(blocks("README.md", "python")[0])
    lines = [json.dumps(row) for row in rows("README.md")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "my.toml"


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 150


def test_the_recipe_of_the_readme_gives_rewards(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    run = load(GrpoRun, recipe)
    assert (ROOT / run.model.path / "config.json").is_file()
    monkeypatch.chdir(recipe.parent)
    prompts = open_prompts(run.data, tiny_tokenizer.build(), seed=0)
    assert (prompts.total, len(prompts.evaluation)) == (4, 2)

    functions = runpy.run_path(str(recipe.parent / "my.py"))
    prompt = prompts.next()
    assert prompt is not None
    a, b = re.findall(r"\d+", prompt.row["prompt"][0]["content"])
    texts = [f" {int(a) + int(b)}\n", "0", f"{int(a) + int(b)}."]
    completions = as_answers(json.dumps(prompt.row).encode(), texts)
    answers = [prompt.row["answer"]] * 3
    rewards = functions["correct"](completions=completions, answer=answers, prompts=None)
    assert rewards == [1.0, 0.0, 0.0]


def test_the_three_shapes_of_a_pair_become_examples():
    tokenizer = tiny_tokenizer.build()
    build = pairs(ExampleData(), tokenizer).build
    found = rows("docs/preferences-and-sft.md")
    first, second, third = (e for row in found for e in build(0, row, Report("docs")) if e)
    assert first == second
    chosen = tokenizer.decode(first.chosen_ids)
    assert chosen.startswith("Ahoy!")
    assert tokenizer.decode(third.prompt_ids + third.rejected_ids[:-1]) == "The sky is blue."
    assert third.rejected_ids[-1] == tokenizer.eos_token_id


def test_the_reward_function_of_how_to_add_scores():
    source = next(block for block in blocks("docs/how-to-add.md", "python") if "def boxed" in block)
    logged: list[tuple[str, float]] = []
    scope: dict[str, Any] = {}
    exec(source, scope)
    completions = [[{"content": text}] for text in (r"\boxed{1} \boxed{4}", r"\boxed{5}", "4")]
    rewards = scope["boxed"](completions, ["4"] * 3, lambda *item: logged.append(item))
    assert rewards == [1.0, 0.0, None]
    assert logged == [("share", pytest.approx(2 / 3))]


def test_the_dpo_loss_of_how_to_add_has_its_value():
    source = next(block for block in blocks("docs/how-to-add.md", "python") if '"cauchy"' in block)
    loss = eval(f"{{{source}}}", {"mx": mx})["cauchy"]
    given = SimpleNamespace(delta=lambda settings: mx.array([5.0]))
    # beta 0.1: log(1 + (1 - 0.5)^2)
    assert loss(given, PreferenceSettings()).item() == pytest.approx(0.22314355)


def test_the_grpo_variant_of_how_to_add_caps_ratios():
    source = next(b for b in blocks("docs/how-to-add.md", "python") if "capped_surrogate" in b)
    scope = dict(vars(grpo))
    exec(source.partition("VARIANTS")[0], scope)
    ratios = mx.array([[2.0, 0.5], [2.0, 0.5]])
    given = grpo.SurrogateInputs(
        logprobs=mx.log(ratios),
        gap=mx.log(ratios),
        coefficient=ratios,
        advantages=mx.array([[-1.0], [3.0]]),
        mask=mx.ones((2, 2)),
        ratio=None,
    )
    loss, values = scope["capped_surrogate"](given, GrpoSettings())
    assert loss.tolist() == [[1.0, 0.5], [-6.0, -1.5]]
    assert values["capped/share"].tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_objective_of_how_to_add_weighs_tokens():
    code = [b for b in blocks("docs/how-to-add.md", "python") if "Focal" in b]
    module = ModuleType("focal")  # where a dataclass looks its annotations up
    exec(code[0], vars(module))
    scope = {**vars(methods), "FocalObjective": vars(module)["FocalObjective"]}
    exec(code[1].partition("METHODS")[0], scope)

    model, ids = tiny_model(), [5, 6, 7, 9, 4]
    objective = scope["_FOCAL"].objective(PreferenceRun(), model, "full", None)
    (arrays,) = objective.prepare([SftExample(0, ids, [0, 0, 1, 1, 1])]).micro
    loss, metrics = objective.loss(model, arrays)

    logprobs = nn.log_softmax(model(mx.array([ids]))[0])
    logs = np.array([logprobs[place - 1, ids[place]].item() for place in (2, 3, 4)])
    weights = (1 - np.exp(logs)) ** 2
    assert loss.item() == pytest.approx(-np.mean(weights * logs), rel=1e-5)
    assert finish_metrics(metrics)["focal/weight"] == pytest.approx(np.mean(weights), rel=1e-5)


def test_the_metric_sink_of_how_to_add_writes_lines(tmp_path: Path):
    source = next(b for b in blocks("docs/how-to-add.md", "python") if "AllRuns" in b)
    scope: dict[str, Any] = {"Sink": Sink, "Any": Any}
    exec(source, scope)
    (tmp_path / "a").mkdir()
    with scope["AllRuns"](tmp_path / "a"):
        (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (line,) = (tmp_path / "all.jsonl").read_text().splitlines()
    assert json.loads(line) == {"run": "a", "step": 1, "loss": 0.5}


@pytest.mark.parametrize(("page", "flag"), named(r"--([a-z_]+\.[a-z_.]+[a-z_])"))
def test_flags_of_keys_exist(page: str, flag: str):
    assert flag in KEYS | {"section.key"}, page


@pytest.mark.parametrize(("page", "key"), named(r"`([a-z]+(?:\.[a-z_0-9]+)+)"))
def test_keys_exist(page: str, key: str):
    if key.partition(".")[0] in SECTIONS and Path(key).suffix not in FILES:
        assert key in KEYS | SECTIONS, page


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_toml_exist(page: str):
    for block in blocks(page, "toml"):
        assert not set(keys_in(tomllib.loads(block))) - KEYS


def test_flags_of_programs_exist():
    programs = (*ROOT.glob("launch/**/*.py"), *ROOT.glob("tests/benchmarks/*.py"))
    sources = "".join(path.read_text(encoding="utf-8") for path in programs)
    flags = named(r"(?<![\w-])(--[a-z][a-z-]+)(?![\w.-])")
    missing = {flag for _, flag in flags if f'"{flag}"' not in sources} - OTHER_PROGRAMS
    assert not missing - {"--help"}


@pytest.mark.parametrize(
    ("page", "path"),
    named(r"(?<![\w/.])((?:protocol|actors|learner|launch|tests|docs|\.ci)/[\w./-]*\w)"),
)
def test_named_files_exist(page: str, path: str):
    assert path in METRICS or (ROOT / path).exists(), page


@pytest.mark.parametrize(("page", "link"), named(r"\]\(([^)\s]+)\)"))
def test_links_resolve(page: str, link: str):
    if re.match(r"https?://", link):
        return
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.is_file(), page
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-")
                          for text in headings}, page  # fmt: skip
