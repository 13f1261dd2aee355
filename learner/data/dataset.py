"""Opens a dataset's rows: from a function, local JSON, or anything that `datasets` can read.

`datasets` takes seconds to import, so it is loaded on use.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from learner.data.functions import load_function
from learner.data.json_rows import SUFFIXES as _JSON
from learner.data.json_rows import open_json
from learner.data.rows import Row, Rows, columns_of, in_memory, joined
from protocol.config.settings import DataSettings
from protocol.errors import DataError

Loaded: TypeAlias = Any  # a Dataset or a dict of them, streamed or not

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_NOT_DATA = ("", ".md", ".txt", ".py")  # often found beside data
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
# Always read as text: CSV readers turn 15 into a number, and NA into null.
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "text")


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
        return _from_function(path, streaming=settings.streaming)

    local = Path(path).expanduser()
    if local.suffix.lower() in _JSON and local.is_file():
        _require_train(path, split)
        return open_json(local, streaming=settings.streaming)

    if local.suffix.lower() in _PACKED and local.is_file():
        raise DataError(f"{path}: a compressed file; unpack it, and name the file that was in it")
    if _looks_local(path) and not local.exists() and not _is_pattern(path):
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


def _from_function(path: str, *, streaming: bool) -> Rows:
    """Return the rows of a function without arguments; each pass over a stream calls it again."""
    make = load_function(path, "data.path")

    def scan(start: int) -> Iterator[Row]:
        for number, row in enumerate(make()):
            if not isinstance(row, dict):
                raise DataError(f"{path}: row {number} must be a dict, not {type(row).__name__}")
            if number >= start:
                yield row

    if streaming:
        return Rows(path, columns_of(scan(0)), scan)

    return in_memory(path, list(scan(0)))


# ---- the files of a folder or pattern -------------------------------------------------------


def _is_pattern(path: str) -> bool:
    """Whether a path may stand for several files on this machine."""
    return "://" not in path and any(letter in path for letter in "*[")


def _split_files(path: str) -> dict[str, list[Path]]:
    """Return the data files of a local folder or pattern by split, in `datasets`' order.

    Empty where a dataset card (README.md) lists them: `datasets` reads the card. Raises OSError
    where there are none.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

    folder = Path(path).expanduser()
    if folder.is_dir():
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        if text.startswith("---") and "data_files" in text:
            return {}
        base = str(folder.absolute())
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    else:
        found = DataFilesDict.from_patterns(sanitize_patterns(str(folder.absolute())))

    return {
        str(split): [Path(name) for name in names if Path(name).suffix.lower() not in _NOT_DATA]
        for split, names in found.items()
    }


# ---- through `datasets` ----------------------------------------------------------------------


def _open_datasets(settings: DataSettings, path: str, split: str) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()

    try:
        loaded = _load(settings, path, split)
        if isinstance(loaded, Rows):
            return loaded
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(_load_failure(path, error)) from error

    loaded = _one_split(loaded, path, split)
    name = f"{path} ({split})"
    if settings.streaming and isinstance(loaded, datasets.Dataset):
        loaded = loaded.to_iterable_dataset()
    if isinstance(loaded, datasets.IterableDataset):
        return _streamed(path, name, loaded)

    return Rows(
        name,
        list(loaded.column_names),
        lambda start: (loaded[index] for index in range(start, len(loaded))),
        lambda index: loaded[index],
        len(loaded),
    )


def _load(settings: DataSettings, path: str, split: str) -> Loaded:
    """Return a dataset or its splits, or Rows for JSON files, which are read without `datasets`."""
    import datasets

    local = Path(path).expanduser()
    if (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(local))

    if (local.is_dir() or _is_pattern(path)) and settings.name is None:
        found = _split_files(path)
        files = found.get(split, [])
        suffixes = {file.suffix.lower() for file in files}
        endings = {".json" if suffix in _JSON else suffix for suffix in suffixes}
        if endings == {".json"}:
            parts = [open_json(file, streaming=settings.streaming) for file in files]
            return joined(f"{path} ({split})", parts)
        if len(endings) == 1 and endings <= _BUILDERS.keys():
            return _load_files(settings, [str(file) for file in files], endings.pop(), split)
        if found and not files:
            # `_one_split` refuses it with the names of the splits that have files.
            return {known: [] for known, others in found.items() if others}

    suffix = Path(path).suffix.lower()
    if suffix in _BUILDERS or suffix in _JSON:
        return _load_files(settings, [str(local) if "://" not in path else path], suffix, "train")
    return datasets.load_dataset(path, settings.name, streaming=settings.streaming)


def _load_files(settings: DataSettings, files: list[str], suffix: str, split: str) -> Loaded:
    import datasets

    builder = _BUILDERS.get(suffix, "json")
    options: dict[str, Any] = {}
    if builder == "csv":
        names = [settings.columns.get(column, column) for column in _TEXT_COLUMNS]
        options["converters"] = dict.fromkeys(names, str)
        options |= {"keep_default_na": False, "na_values": [""]}  # an empty cell is null
    if suffix == ".tsv":
        options["sep"] = "\t"

    return datasets.load_dataset(
        builder, data_files={split: files}, streaming=bool(settings.streaming), **options
    )


def _one_split(loaded: Loaded, path: str, split: str) -> Loaded:
    """Return the requested split; a set saved alone is "train", or the split that it came from."""
    if not isinstance(loaded, dict):
        loaded = dict.fromkeys(("train", str(loaded.split or "train")), loaded)

    if not loaded:
        raise DataError(f"{path}: no data files; name a file, or a folder that holds some")
    if split not in loaded:
        raise DataError(
            f"{path}: no split {split!r}; it has {sorted(map(str, loaded))}; set data.split to one"
        )
    return loaded[split]


def _load_failure(path: str, error: Exception) -> str:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if _looks_local(path) or Path(path).expanduser().exists():
        return (
            f"{path}: cannot be read: {reason}; check that the file is complete and in the format "
            "that its name says"
        )
    return (
        f"dataset {path!r} cannot be loaded: {reason}; check the name and the network connection "
        "(HF_HUB_OFFLINE, HF_TOKEN for gated sets), or set data.path to a local file"
    )


def _streamed(path: str, name: str, stream: Loaded) -> Rows:
    def scan(start: int) -> Iterator[Row]:
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
