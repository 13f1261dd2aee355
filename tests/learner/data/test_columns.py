"""What offline runs report about columns: misspelt, of another method, read by nothing."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from learner.build.offline import open_examples
from learner.data.examples import pairs, sequences
from learner.offline.source import open_offline
from protocol.config.settings import ExampleData, PreferenceRun, PreferenceSettings, SftRun
from protocol.errors import DataError
from tests.parity import tiny_tokenizer

SET = "rename them with data.columns, or make rows of them in data.prepare"


def opened(tmp_path: Path, rows: list[dict[str, Any]], build: Any = pairs, **data: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ExampleData(path=str(path), **data)
    open_offline(settings, build(settings, tiny_tokenizer.build()), seed=0, batch_size=2)


@pytest.mark.parametrize(
    ("row", "build", "hint"),
    [
        ({"prompt": "a", "chosn": "b", "rejected": "c"}, pairs,
         'no chosen; the row has [\'chosn\', \'prompt\', \'rejected\']; data.columns = '
         '{chosen = "chosn"} would read that column'),
        ({"prompt": "a", "completion": "b", "label": True}, pairs,
         '; for judged answers set objective.method = "kto"'),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, sequences,
         "no completion; the row has ['chosen', 'prompt', 'rejected']; launch/preference.py "
         "trains on pairs"),
        ({"message": [{"role": "user", "content": "a"}]}, sequences,
         'data.columns = {messages = "message"} would read that column'),
        ({"prompt": "a", "good": "b", "bad": "c"}, pairs,
         "no chosen; the row has ['bad', 'good', 'prompt']"),
    ],
)  # fmt: skip
def test_a_missing_column_says_what_may_have_been_meant(
    tmp_path: Path, row: dict[str, Any], build: Any, hint: str
):
    with pytest.raises(DataError) as error:
        opened(tmp_path, [row] * 7, build)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("none of 7 rows can be used; nothing to train on")
    assert len(lines) == 3 + 5  # a summary, the reason, and five of the rows
    assert lines[3].startswith("    row 0: ")
    assert lines[3].endswith(hint)


def test_identical_answers_are_kept_as_in_trl_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "pippin.data")
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "bbbbc", "rejected": "bbbbd"},
    ]
    opened(tmp_path, rows, max_length=3)
    assert caplog.messages == [
        f"{tmp_path / 'rows.jsonl'}: 3 rows kept, 0 dropped, 1 truncated",
        "  truncated: rows 2",
        "  chosen and rejected are identical: rows 0, 2",
    ]


def test_lines_about_single_rows_have_a_logger_of_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "pippin.data")
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    opened(tmp_path, [{**good, "chosen": ""}, good, {**good, "rejected": ""}])
    assert [(record.name, record.message) for record in caplog.records] == [
        ("pippin.data", f"{tmp_path / 'rows.jsonl'}: 1 rows kept, 2 dropped, 0 truncated"),
        ("pippin.data", "  dropped for empty_answer: 2"),
        ("pippin.data.rows", "    row 0: chosen is empty"),
        ("pippin.data.rows", "    row 2: rejected is empty"),
    ]


def test_columns_that_nothing_reads_and_implicit_prompts_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "pippin.data")
    row = {"instruction": "Say b.", "chosen": "a b", "rejected": "a c", "id": 1}
    opened(tmp_path, [row])
    name = tmp_path / "rows.jsonl"
    assert caplog.messages[:2] == [
        f"{name}: nothing reads the columns ['id', 'instruction']; {SET}",
        f"{name}: no column prompt, so it is what chosen and rejected both begin with; if it is "
        'in instruction, set data.columns = {prompt = "instruction"}; if it is in several columns, '
        "join them in data.prepare",
    ]
    caplog.clear()
    opened(tmp_path, [{"chosen": "a b", "rejected": "a c"}])
    assert caplog.messages == [
        f"{name}: no column prompt, so it is what chosen and rejected both begin with",
        f"{name}: 1 rows kept, 0 dropped, 0 truncated",
    ]
    caplog.clear()
    opened(tmp_path, [row], columns={"prompt": "instruction"})
    assert caplog.messages == [
        f"{name}: nothing reads the columns ['id']; {SET}",
        f"{name}: 1 rows kept, 0 dropped, 0 truncated",
    ]


@dataclass
class Policy:
    """What examples need of a policy."""

    tokenizer: Any


@pytest.mark.parametrize(
    ("method", "unread"),
    [
        ("sft", ["chosen", "label", "preference_score", "rejected"]),
        ("kto", ["messages", "preference_score", "text"]),
        ("dpo", ["completion", "label", "messages", "text"]),
        ("orpo", ["completion", "label", "messages", "text"]),
    ],
)
def test_columns_of_other_methods_are_read_by_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: Any, unread: list[str]
):
    caplog.set_level(logging.INFO, "pippin.data")
    row = {"prompt": "a", "completion": "b", "label": True, "chosen": "b", "rejected": "c"}
    row |= {"messages": [], "text": "d", "preference_score": 1.0, "tools": None}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data = ExampleData(path=str(path))
    run: Any = SftRun(data=data)
    if method != "sft":
        run = PreferenceRun(data=data, objective=PreferenceSettings(method=method))
    policy: Any = Policy(tiny_tokenizer.build())
    assert len(open_examples(run, policy).first_batches()) == 1
    assert caplog.messages[0] == f"{path}: nothing reads the columns {unread}; {SET}"
    assert "no column prompt" not in caplog.text


def test_a_name_of_ours_that_is_misspelt_is_refused(tmp_path: Path):
    rows = [{"question": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(DataError, match=r"nothing reads a column 'promt'; did you mean 'prompt'"):
        opened(tmp_path, rows, columns={"promt": "question"})
    opened(tmp_path, rows, columns={"prompt": "question", "note": "question"})
