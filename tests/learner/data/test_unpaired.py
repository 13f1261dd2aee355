"""Pairs as KTO's judged answers: TRL's tokens, labels and order; bad rows; exact resume."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from learner.data.examples import answers
from learner.offline.source import open_offline
from protocol.config.settings import ExampleData
from protocol.errors import DataError
from tests.parity.tiny_tokenizer import answers_digest, build, numbered_pairs

GOLDEN = Path(__file__).parents[2] / "parity" / "tokens" / "unpaired.json"
CASES = json.loads(GOLDEN.read_text())["cases"]


@pytest.fixture(scope="module")
def tokenizer():
    return build()


def opened(tmp_path, tokenizer, rows, *, block=1000, seed=0, batch_size=4, epochs=1.0, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    data = ExampleData(path=str(path), **{"order": "sequential", **settings})
    builder = replace(answers(data, tokenizer), rows_per_block=block)
    return open_offline(data, builder, seed=seed, batch_size=batch_size, epochs=epochs)


def given(source):
    return list(itertools.chain(*iter(source.next_batch, None)))


def sides(examples):
    return [(example.row, example.label) for example in examples]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_pairs_become_trls_answers_in_its_order(tmp_path, tokenizer, case, streaming):
    rows = case["rows"] if "rows" in case else numbered_pairs(case["count"])
    limit = case["max_length"]
    source = opened(tmp_path, tokenizer, rows, max_length=limit, streaming=streaming)
    found = [
        {
            "input_ids": example.prompt_ids + example.completion_ids,
            "mask": [0] * len(example.prompt_ids) + [1] * len(example.completion_ids),
            "label": example.label,
        }
        for example in given(source)
    ]
    assert (found if "rows" in case else answers_digest(found)) == case["expected"]


ROWS = [
    {"prompt": "a ", "chosen": "b", "rejected": "c"},
    {"prompt": "a ", "completion": "b", "label": False},
    {"prompt": "12 is ", "chosen": "blue", "rejected": "42"},  # 42 alone keeps the prompt's space
    {"prompt": "a ", "chosen": "b", "rejected": ""},
    {"prompt": "a ", "chosen": "b"},
    {"prompt": "a ", "completion": "b"},
    {"prompt": "not " * 9, "chosen": "b", "rejected": "c"},
]


def test_rows_of_both_kinds_and_their_faults(tmp_path, tokenizer):
    source = opened(tmp_path, tokenizer, ROWS, max_length=3)
    assert sides(given(source)) == [(0, True), (1, False), (2, True), (0, False)]
    assert source.report.kept == 3
    assert [(bad.row, bad.kind) for bad in source.report.dropped_rows] == [
        (2, "prompt_too_long"),
        (3, "empty_answer"),
        (4, "missing_column"),
        (5, "missing_column"),
        (6, "prompt_too_long"),
    ]
    text = "\n".join(source.report.lines())
    assert "3 rows kept, 5 dropped, 2 truncated" in text
    assert (
        "row 2: the prompt's 3 tokens fill data.max_length = 3; no completion token is left; "
        in (text)
    )
    assert "row 3: rejected is empty" in text
    assert "row 4: no rejected; the row has ['chosen', 'prompt']" in text
    assert "row 5: no label" in text
    assert source.report.truncated_rows == [0, 2]


@pytest.mark.parametrize(("bad", "words"), [(2, "fill data.max_length"), (3, "rejected is empty")])
def test_on_bad_row_error_stops_at_a_pair_with_one_bad_answer(tmp_path, tokenizer, bad, words):
    rows = [ROWS[0], ROWS[1], ROWS[bad]]
    with pytest.raises(DataError, match=rf"row 2 \(counted from 0\): .*{words}.*data\.on_bad_row"):
        opened(tmp_path, tokenizer, rows, max_length=3, on_bad_row="error")


def test_held_out_rows_bring_both_their_answers_and_are_not_trained_on(tmp_path, tokenizer):
    rows = numbered_pairs(6)
    sets = opened(tmp_path, tokenizer, rows, eval_rows=2)
    held_out = [example.row for example in sets.evaluation]
    assert held_out[:2] == held_out[2:]  # not one pair's answers next to each other
    assert [example.label for example in sets.evaluation] == [True, True, False, False]
    trained = {example.row for example in given(sets)}
    assert trained == set(range(6)) - set(held_out)
    capped = opened(tmp_path, tokenizer, rows, max_rows=2)
    assert sides(given(capped)) == [(0, True), (1, True), (0, False), (1, False)]


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
@pytest.mark.parametrize("taken", [0, 1, 2, 5, 9, 10])
def test_streamed_answers_resume_exactly(tmp_path, tokenizer, order, taken):
    rows: list[dict[str, Any]] = [row for row in numbered_pairs(16) if "not" not in row["prompt"]]
    rows[3:3] = [{"prompt": "a", "chosen": "", "rejected": "c"}] * 3  # bad ones at a block's end
    rows[9:9] = [{"prompt": "a", "completion": "b", "label": True}]
    shared = {"streaming": True, "order": order, "shuffle_buffer": 4, "epochs": 3, "batch_size": 9}
    shared["block"] = 5
    whole = opened(tmp_path, tokenizer, rows, **shared)
    batches = [sides(batch) for batch in iter(whole.next_batch, None)]
    assert len(batches) == 12  # 29 answers an epoch
    seen = sorted(itertools.chain(*batches[:4]))
    assert seen == sorted(itertools.chain(*batches[4:8]))
    assert len(set(seen)) == 29
    assert (batches[:4] == batches[4:8]) == (order == "sequential")
    source = opened(tmp_path, tokenizer, rows, **shared)
    for _ in range(taken):
        source.next_batch()
    again = opened(tmp_path, tokenizer, rows, **shared)
    again.restore(source.state())
    assert [sides(batch) for batch in iter(again.next_batch, None)] == batches[taken:]


def test_a_shuffled_stream_mixes_good_and_bad_answers(tmp_path, tokenizer):
    rows = numbered_pairs(600)
    source = opened(tmp_path, tokenizer, rows, streaming=True, order="shuffled", shuffle_buffer=50)
    labels = [example.label for example in given(source)]
    assert len(labels) == 1200
    # of 600 draws without replacement from as many of each, deviation about 8.7
    assert abs(sum(labels[:600]) - 300) < 60
