"""The checker on the project's own goldens, and its refusals."""

import json
from pathlib import Path

import pytest

from tests.parity.run_goldens import main

GOLDENS = Path(__file__).parent / "goldens"


def test_losses_equal_trl(capsys):
    assert main(GOLDENS) == 0
    passed, total = capsys.readouterr().out.strip().split("/")
    assert passed == total
    assert int(total) == len(
        json.loads((GOLDENS / "grpo.json").read_text())["cases"]
    ) + preference_cases(json.loads((GOLDENS / "preference.json").read_text()))


def preference_cases(data):
    judged = sum(len(batch["cases"]) for batch in data["kto"])
    return len(data["dpo"]["cases"]) + 1 + len(data["cpo"]) + judged


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["dpo"]["cases"][0].update(loss=0.5), "FAIL preference.json dpo[0]"),
        (lambda data: data["dpo"]["cases"][0]["kw"].update(gamma=1), "unknown keys ['gamma']"),
        (lambda data: data.update(bco=[]), "unknown keys ['bco']"),
        (lambda data: data["kto"][1]["cases"][0].update(loss=0.5), "FAIL preference.json kto[1]"),
        (lambda data: data["kto"][0]["cases"][1]["metrics"].pop("kl"), "kl: ours"),
        (lambda data: data["kto"][0].update(weights=[]), "unknown keys ['weights']"),
        (lambda data: data["kto"][0]["cases"][0]["kw"].update(ls=0.1), "unknown keys ['ls']"),
    ],
)
def test_a_wrong_value_or_key_fails(tmp_path, capsys, change, said):
    data = json.loads((GOLDENS / "preference.json").read_text())
    change(data)
    (tmp_path / "preference.json").write_text(json.dumps(data))
    assert main(tmp_path) == 1
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_a_folder_without_cases_fails(tmp_path):
    assert main(tmp_path) == 1
