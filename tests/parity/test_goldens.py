"""The checker on the project's own goldens, and its refusals."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

from tests.parity.golden_cases import Case
from tests.parity.run_goldens import check, difference, main

GOLDENS = Path(__file__).parent / "goldens"
NAN, INF = math.nan, math.inf


def read(name):
    return json.loads((GOLDENS / f"{name}.json").read_text())


def test_losses_equal_trl(capsys):
    assert main(GOLDENS) == 0
    captured = capsys.readouterr()
    passed, total = captured.out.strip().split("/")
    assert passed == total
    grpo = sum(len(read(name)["cases"]) for name in ("grpo", "grpo_masked", "grpo_options"))
    assert int(total) == grpo + preference_cases(read("preference"))
    assert captured.err == ""  # nothing needs float64


def preference_cases(data):
    judged = sum(len(batch["cases"]) for batch in data["kto"])
    return len(data["dpo"]["cases"]) + 1 + len(data["cpo"]) + judged


def first(data):
    return data["dpo"]["cases"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: first(data).update(loss=0.5), "FAIL preference.json dpo[0][0]"),
        (lambda data: first(data).update(loss_type=["bco"]), "unknown losses ['bco']"),
        (lambda data: first(data).pop("grad"), "keys ['grad'] are missing"),
        (lambda data: first(data)["kw"].update(gamma=1), "unknown keys ['gamma']"),
        (lambda data: first(data)["kw"].update(beta="0.1"), "Expected `float`"),
        (lambda data: first(data)["metrics"].update(kl=0.1), "kl: ours is missing, TRL 0.1"),
        (lambda data: data["dpo"].update(ref=[[0.0]]), "FAIL preference.json dpo[0][3]"),
        (lambda data: data.update(bco=[]), "unknown keys ['bco']"),
        (lambda data: data.update(cpo=[3]), "cpo: a list of objects is required"),
        (lambda data: data.update(kto=[3]), "an object is required, got int"),
        (lambda data: data["kto"][1]["cases"][0].update(loss=0.5), "FAIL preference.json kto[1]"),
        (lambda data: data["kto"][0]["cases"][1]["metrics"].pop("kl"), "kl: ours"),
        (lambda data: data["kto"][0].update(weights=[]), "unknown keys ['weights']"),
        (lambda data: data["kto"][0]["cases"][0]["kw"].update(ls=0.1), "unknown keys ['ls']"),
        (lambda data: data["orpo"].update(losses=[0.1]), "ours has shape (6,), TRL (1,)"),
    ],
)
def test_a_wrong_value_or_key_fails(tmp_path, capsys, change, said):
    data = read("preference")
    change(data)
    (tmp_path / "preference.json").write_text(json.dumps(data))
    assert main(tmp_path) == 1
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"inputs": ', "sft.json is not JSON"),
        ('{"steps": []}', "unknown keys ['steps']"),
        ("[1]", "an object is required, got list"),
        ('{"cases": []}', "keys ['inputs'] are missing"),
    ],
)
def test_a_file_of_another_format_fails_beside_good_ones(tmp_path, capsys, text, said):
    (tmp_path / "grpo.json").write_text((GOLDENS / "grpo_masked.json").read_text())
    (tmp_path / "sft.json").write_text(text)
    assert main(tmp_path) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == "16/16\n"


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_cases_fails(tmp_path, capsys, exists):
    assert main(tmp_path if exists else tmp_path / "none") == 1
    assert "no cases" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "equal"),
    [
        ("loss", 1.0 + 9e-7, 1.0, True),
        ("loss", 1.0 + 2e-6, 1.0, False),
        ("grad", [9e-8], [0.0], True),
        ("grad", [2e-7], [0.0], False),
        ("grad", [3.0], [INF], True),  # the finite limit
        ("grad", [INF], [INF], False),
        ("loss", NAN, NAN, False),
        ("loss", 3.0, None, True),
        ("kl", NAN, None, True),
        ("kl", 3.0, None, False),
        ("kl", NAN, 3.0, False),
        ("kl", None, 3.0, False),
    ],
)
def test_the_bar(name, ours, theirs, equal):
    assert (difference(name, ours, theirs) is None) == equal


@pytest.mark.parametrize(
    ("float32", "float64", "single", "faults", "rounded"),
    [
        (1.0, 1.5, False, 0, 0),  # within the bar: float64 is not asked
        (1.0 + 8e-6, 1.0, False, 0, 1),
        (1.0 + 8e-6, 1.0 + 5e-6, False, 2, 0),  # wrong in float64 too
        (1.0 + 8e-6, 1.0 + 5e-6, True, 0, 1),  # TRL's own rounding
        (1.0 + 8e-6, 1.0 + 5e-5, True, 2, 0),
        (1.0 + 1e-4, 1.0, False, 1, 0),  # more than rounding
    ],
)
def test_float64_decides_what_float32_rounds(float32, float64, single, faults, rounded):
    def evaluate(dtype):
        yield "loss", float32 if dtype == mx.float32 else float64, 1.0

    assert tuple(map(len, check(Case("here", evaluate, single)))) == (faults, rounded)
