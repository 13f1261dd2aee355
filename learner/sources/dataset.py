"""Datasets as rows: local JSON and JSONL read here, everything else through `datasets`.

JSON is read without Arrow, which fills missing columns, unifies types and drops lone surrogates:
a bad row would be repaired in silence instead of being reported. `datasets` takes seconds to
import, so it is loaded on use.
"""

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from learner.sources.functions import load_function
from protocol.errors import DataError
from protocol.settings import DataSettings

RawRow = dict[str, Any]
Loaded: TypeAlias = Any  # a Dataset or a dict of them, streamed or not

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_JSON = (".json", ".jsonl", ".ndjson")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
# Text whatever it looks like: CSV readers make 15 a number, and NA nothing.
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "text")
_SAMPLED_ROWS = 100  # rows whose keys stand for the columns of a JSON file


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in the file's order, counted from 0.

    `scan(start)` reads lazily from row `start`. `get` and `length` are None for streams.
    `columns` are the names known without reading the whole set.
    """

    name: str
    columns: list[str]
    scan: Callable[[int], Iterator[RawRow]]
    get: Callable[[int], RawRow] | None = None
    length: int | None = None


def open_rows(settings: DataSettings, *, path: str = "", split: str = "") -> Rows:
    """Open the training rows, or those of another `path` or `split`.

    Raises DataError that names the path and what to do: unreachable, missing, no such split,
    malformed.
    """
    path = path or settings.path
    split = split or settings.split
    if not path:
        raise DataError("data.path is empty; set it to a hub id, a file or a folder")
    if ".py:" in path:
        _require_train(path, split)
        return _generated(path, streaming=settings.streaming)
    local = Path(path).expanduser()
    if local.suffix.lower() in _JSON and local.is_file():
        _require_train(path, split)
        return _open_json(local, streaming=settings.streaming)
    if local.suffix.lower() in _PACKED and local.is_file():
        raise DataError(f"{path}: a compressed file; unpack it, and name what was in it")
    if _looks_local(path) and not local.exists() and not any(c in path for c in "*["):
        raise DataError(f"data.path {path}: no such file or folder (looked at {local.absolute()})")
    return _open_datasets(settings, path, split)


def _looks_local(path: str) -> bool:
    if "://" in path:
        return False
    known = Path(path).suffix.lower() in (*_JSON, *_BUILDERS)
    return known or path.startswith((".", "/", "~")) or path.count("/") > 1


def _require_train(path: str, split: str) -> None:
    if split != "train":
        raise DataError(
            f"{path}: split {split!r} asked for, but a single file has the split 'train' only; "
            "for held-out rows set data.eval_path to another file, or data.eval_rows to a number"
        )


def _generated(path: str, *, streaming: bool) -> Rows:
    """Rows that a function makes: it takes nothing and returns or yields mappings.

    For a stream, each pass calls it anew and takes rows as they are needed.
    """
    make = load_function(path, "data.path")

    def scan(start: int) -> Iterator[RawRow]:
        for number, row in enumerate(make()):
            if not isinstance(row, dict):
                raise DataError(f"{path}: row {number} must be a dict, not {type(row).__name__}")
            if number >= start:
                yield row

    if streaming:
        return Rows(path, _columns_of(islice(scan(0), _SAMPLED_ROWS)), scan)
    rows = list(scan(0))
    return Rows(
        path, _columns_of(iter(rows)), lambda start: iter(rows[start:]), rows.__getitem__, len(rows)
    )


# ---- JSON ------------------------------------------------------------------------------------


def _open_json(path: Path, *, streaming: bool) -> Rows:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if b"\0" in head:
        raise DataError(f"{path}: holds NUL bytes, as UTF-16 does; save it as UTF-8 text")
    head = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        raise DataError(f"{path}: the file is empty; it must hold rows")
    if head.startswith(b"["):
        return _json_array(path)
    return _json_lines(path, streaming=streaming)


def _json_array(path: Path) -> Rows:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON: {error}; mend the file") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {type(row).__name__}; it must be an object")
    columns = _columns_of(islice(rows, _SAMPLED_ROWS))
    scan = lambda start: (dict(row) for row in islice(rows, start, None))  # noqa: E731
    return Rows(str(path), columns, scan, lambda index: dict(rows[index]), len(rows))


def _json_lines(path: Path, *, streaming: bool) -> Rows:
    def scan(start: int) -> Iterator[RawRow]:
        with path.open("rb") as file:
            filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            for number, line in islice(filled, start, None):
                yield _json_line(path, number, line)

    columns = _columns_of(islice(scan(0), _SAMPLED_ROWS))
    if streaming:
        return Rows(str(path), columns, scan)
    offsets, numbers = _line_index(path)

    def get(index: int) -> RawRow:
        with path.open("rb") as file:
            file.seek(offsets[index])
            return _json_line(path, numbers[index], file.readline())

    return Rows(str(path), columns, scan, get, len(offsets))


def _line_index(path: Path) -> tuple["array[int]", "array[int]"]:
    """Byte offsets and line numbers (from 1) of the lines that hold something."""
    offsets, numbers = array("Q"), array("Q")
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                offsets.append(at)
                numbers.append(number)
            at += len(line)
    return offsets, numbers


def _json_line(path: Path, number: int, line: bytes) -> RawRow:
    try:
        row = json.loads(line.lstrip(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: line {number} is malformed JSON: {error}; every line must be one object"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path}: line {number} is {type(row).__name__}; every line must be one object"
        )
    return row


def _columns_of(rows: Iterator[RawRow]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


# ---- through `datasets` ----------------------------------------------------------------------


def _open_datasets(settings: DataSettings, path: str, split: str) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    try:
        if (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
            loaded: Loaded = datasets.load_from_disk(str(local))
        else:
            loaded = _load_dataset(settings, path)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(_load_failure(path, error)) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(
                f"{path}: no split {split!r}; it has {sorted(loaded)}; set data.split to one"
            )
        loaded = loaded[split]
    name = f"{path} ({split})"
    if isinstance(loaded, datasets.IterableDataset):
        return _streamed(path, name, loaded)
    return Rows(
        name,
        list(loaded.column_names),
        lambda start: (loaded[index] for index in range(start, len(loaded))),
        lambda index: loaded[index],
        len(loaded),
    )


def _load_dataset(settings: DataSettings, path: str) -> Loaded:
    import datasets

    suffix = Path(path).suffix.lower()
    builder = "json" if suffix in _JSON else _BUILDERS.get(suffix)
    if builder is None:
        return datasets.load_dataset(path, settings.name, streaming=settings.streaming)
    options: dict[str, Any] = {}
    if builder == "csv":
        names = [settings.columns.get(column, column) for column in _TEXT_COLUMNS]
        options["converters"] = dict.fromkeys(names, str)
        options |= {"keep_default_na": False, "na_values": [""]}  # an empty cell holds nothing
    if suffix == ".tsv":
        options["sep"] = "\t"
    files = str(Path(path).expanduser()) if "://" not in path else path
    return datasets.load_dataset(
        builder, data_files={"train": files}, streaming=bool(settings.streaming), **options
    )


def _load_failure(path: str, error: Exception) -> str:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if Path(path).expanduser().exists():
        return f"{path}: cannot be read: {reason}; check that the file is whole and of its format"
    return (
        f"dataset {path!r} cannot be had: {reason}; check the name and the network connection "
        "(HF_HUB_OFFLINE, HF_TOKEN for gated sets), or set data.path to a local file"
    )


def _streamed(path: str, name: str, stream: Loaded) -> Rows:
    def scan(start: int) -> Iterator[RawRow]:
        rows = iter(stream.skip(start) if start else stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except (OSError, ValueError, RuntimeError) as error:
                raise DataError(_load_failure(path, error)) from error
            yield row

    columns = stream.column_names or list(next(scan(0), {}))
    return Rows(name, columns, scan)
