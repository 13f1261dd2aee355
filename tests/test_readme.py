"""README holds: its rows can be trained on, its flags exist."""

import json
import re
from pathlib import Path

import pytest

from learner.data.examples import pairs
from learner.data.filter import Report
from protocol.config.fields import leaf_fields
from protocol.config.settings import PROGRAMS, ExampleData
from tests.parity import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [json.loads(line) for line in README.splitlines() if line.startswith("{")]
FLAGS = sorted(set(re.findall(r"--([a-z_]+\.[a-z_.]+[a-z_])", README)) - {"section.key"})


def test_its_three_shapes_of_a_pair_become_examples():
    tokenizer = tiny_tokenizer.build()
    build = pairs(ExampleData(), tokenizer).build
    first, second, third = (e for row in ROWS for e in build(0, row, Report("README")) if e)
    assert first == second
    chosen = tokenizer.decode(first.chosen_ids)
    assert chosen.startswith("Ahoy!")
    assert tokenizer.decode(third.prompt_ids + third.rejected_ids[:-1]) == "The sky is blue."
    assert third.rejected_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("flag", FLAGS)
def test_its_flags_exist(flag: str):
    assert any(flag in leaf_fields(cls) for cls in PROGRAMS)
