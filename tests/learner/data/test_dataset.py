"""Datasets as rows: local formats, and the errors of those that cannot be loaded."""

import gc
import json

import pytest

from learner.data.dataset import open_rows
from learner.data.prepare import preparation, with_system_prompt
from learner.data.rows import ReadRow, Row, RowError
from protocol.config.settings import DataSettings
from protocol.errors import DataError

ROWS = [{"question": f"{n}?", "answer": str(n)} for n in range(5)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def good(row: ReadRow) -> Row:
    assert not isinstance(row, RowError)
    return row


def _write(path, rows=ROWS):
    import datasets

    data = datasets.Dataset.from_list(rows)
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        case ".csv":
            data.to_csv(path, index=False)
        case ".parquet":
            data.to_parquet(path)
        case _:
            data.save_to_disk(path)
    return str(path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "saved"])
def test_local_rows_come_in_the_files_order(tmp_path, name, streaming):
    path = _write(tmp_path / name)
    rows = open_rows(DataSettings(path=path, streaming=streaming))
    found = [{key: str(value) for key, value in row.items()} for row in map(good, rows.scan(0))]
    assert found == ROWS
    assert [row["question"] for row in map(good, rows.scan(3))] == ["3?", "4?"]
    assert rows.columns == ["question", "answer"]
    if rows.get is not None:
        assert rows.length == 5
        assert good(rows.get(2))["question"] == "2?"
    gc.collect()  # `datasets` leaves streamed CSV files open: let their warning fall in here


def test_a_folder_of_files_is_a_dataset(tmp_path):
    _write(tmp_path / "train.parquet")
    rows = open_rows(DataSettings(path=str(tmp_path)))
    assert [row["answer"] for row in map(good, rows.scan(0))] == list("01234")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_text_of_a_folder_of_tables_stays_text(tmp_path, ending, streaming):
    comma = {".csv": ",", ".tsv": "\t"}[ending]
    folder = tmp_path / "tables"
    folder.mkdir()
    for split, row in (("train", ["12", "007", "NA"]), ("test", ["3", "4", "5"])):
        lines = [["prompt", "chosen", "rejected"], row]
        text = "".join(f"{comma.join(line)}\n" for line in lines)
        (folder / f"{split}{ending}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    path = str(folder)
    rows = open_rows(DataSettings(path=path, streaming=streaming))
    assert list(rows.scan(0)) == [{"prompt": "12", "chosen": "007", "rejected": "NA"}]
    held_out = open_rows(DataSettings(path=path, streaming=streaming), split="test")
    assert [row["prompt"] for row in map(good, held_out.scan(0))] == ["3"]
    gc.collect()


def test_a_saved_set_is_no_other_split_and_streams_if_asked(tmp_path):
    path = _write(tmp_path / "saved")
    with pytest.raises(DataError, match=r"no split 'test'; it has \['train'\]"):
        open_rows(DataSettings(path=path), split="test")
    assert open_rows(DataSettings(path=path, streaming=True)).length is None
    import datasets

    part = datasets.Dataset.from_list(ROWS, split=datasets.NamedSplit("train_sft"))
    part.save_to_disk(tmp_path / "part")
    for split in ("train", "train_sft"):
        rows = open_rows(DataSettings(path=str(tmp_path / "part")), split=split)
        assert rows.length == len(ROWS)
    splits = datasets.DatasetDict({"train": part.select([0, 1]), "test": part.select([2])})
    splits.save_to_disk(tmp_path / "splits")
    rows = open_rows(DataSettings(path=str(tmp_path / "splits")), split="test")
    assert list(rows.scan(0)) == [ROWS[2]]


def test_json_rows_keep_their_types_and_surrogates(tmp_path):
    rows = [{"a": "x"}, {"a": 3}, {"b": "\ud800"}]
    path = _write_text(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert list(open_rows(DataSettings(path=path)).scan(0)) == rows


def _write_text(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "[{", r"a\.json: malformed JSON"),
        (
            "a.json",
            '{"a": 1}\n{"a": \n',
            r"a\.json, line 2 is malformed JSON: .*or the file one array",
        ),
        ("a.json", '{"a": 1}\n[{"a": 1}]\n', r"a\.json, line 2 is list; it must be an object"),
        ("a.jsonl", "\n", "the file is empty"),
        ("a.parquet", "no parquet", r"a\.parquet: cannot be read"),
        ("a.jsonl", "{\0}\0", "holds NUL bytes, as UTF-16 does; save it as UTF-8"),
        ("a.json", '[{"a": ' + "[" * 100_000, "malformed JSON: maximum recursion"),
        ("a.jsonl.gz", "packed", r"a\.jsonl\.gz: a compressed file; unpack it"),
    ],
)
def test_malformed_files_name_the_path(tmp_path, name, text, words):
    path = _write_text(tmp_path / name, text)
    with pytest.raises(DataError, match=words):
        list(open_rows(DataSettings(path=path)).scan(0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("text", ["a,b\n1,2\n1,2,3\n", 'a,b\n"1,2\n', ""])
def test_a_malformed_stream_names_the_path(tmp_path, text):
    path = _write_text(tmp_path / "a.csv", text)
    words = r"a\.csv: cannot be read: .*check that the file is complete"
    with pytest.raises(DataError, match=words):
        list(open_rows(DataSettings(path=path, streaming=True)).scan(0))
    gc.collect()  # `datasets` leaves the file open: let its warning fall in here


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_text_of_a_csv_file_stays_text(tmp_path, streaming):
    path = _write_text(tmp_path / "a.csv", "prompt,good,rejected,label\n12,007,NA,1\n3, a ,,0\n")
    settings = DataSettings(path=path, columns={"chosen": "good"}, streaming=streaming)
    assert list(open_rows(settings).scan(0)) == [
        {"prompt": "12", "good": "007", "rejected": "NA", "label": 1},
        {"prompt": "3", "good": " a ", "rejected": None, "label": 0},
    ]
    gc.collect()


def test_what_cannot_be_reached_says_what_to_do(tmp_path):
    for path, words in [
        ("", r"data\.path is empty"),
        (str(tmp_path / "none.jsonl"), "no such file or folder"),
        ("nobody/nothing", "'nobody/nothing' cannot be loaded.*network connection"),
    ]:
        with pytest.raises(DataError, match=words):
            open_rows(DataSettings(path=path))
    with pytest.raises(DataError, match="split 'test' asked for"):
        open_rows(DataSettings(path=_write(tmp_path / "a.json"), split="test"))
    _write(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="split"):
        open_rows(DataSettings(path=str(tmp_path), split="test"))
    for path in (tmp_path / "*.jsonl", tmp_path / "*.csv"):
        with pytest.raises(DataError, match="no data files"):
            open_rows(DataSettings(path=str(path)))


def test_columns_are_renamed_and_a_missing_one_names_the_nearest(tmp_path):
    path = _write(tmp_path / "a.json")
    settings = DataSettings(path=path, columns={"prompt": "question"})
    rows = open_rows(settings)
    assert preparation(settings, rows)(ROWS[1]) == {"prompt": "1?", "answer": "1"}
    wrong = DataSettings(path=path, columns={"prompt": "questoin"})
    with pytest.raises(DataError, match=r"data\.columns\.prompt.*did you mean 'question'"):
        preparation(wrong, rows)


PREPARE = """
def keep_even(row):
    if int(row["answer"]) % 2:
        return None
    return {"prompt": row["question"]}

def fail(row):
    raise KeyError("gold")
"""


def test_prepare_changes_and_leaves_out_rows(tmp_path):
    path, code = _write(tmp_path / "a.json"), _write_text(tmp_path / "mine.py", PREPARE)
    settings = DataSettings(path=path, prepare=f"{code}:keep_even")
    prepare = preparation(settings, open_rows(settings))
    assert [prepare(row) for row in ROWS[:3]] == [{"prompt": "0?"}, None, {"prompt": "2?"}]
    failing = DataSettings(path=path, prepare=f"{code}:fail")
    with pytest.raises(RowError, match="KeyError: 'gold'"):
        preparation(failing, open_rows(failing))(ROWS[0])
    absent = DataSettings(path=path, prepare=f"{code}:keep_evn")
    with pytest.raises(DataError, match="did you mean 'keep_even'"):
        preparation(absent, open_rows(absent))


def test_the_system_prompt_opens_the_conversation():
    system = {"role": "system", "content": "S"}
    user = {"role": "user", "content": "u"}
    assert with_system_prompt({"prompt": "u", "x": 1}, "S") == {"prompt": [system, user], "x": 1}
    assert with_system_prompt({"prompt": [system, user]}, "T") == {"prompt": [system, user]}
    assert with_system_prompt({"messages": [user]}, "S") == {"messages": [system, user]}
