"""The data files of a local folder or pattern, by split, as `datasets` finds them."""

# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false

from collections.abc import Sequence
from pathlib import Path

from learner.data import json_rows

_NOT_DATA = ("", ".md", ".txt", ".py")  # files that often lie beside data


def is_pattern(path: str) -> bool:
    """Whether a path may stand for several files on this machine."""
    return "://" not in path and any(letter in path for letter in "*[")


def split_files(path: str) -> dict[str, list[Path]]:
    """Return the data files of a local folder or pattern by split, in `datasets`' order.

    Empty where a dataset card (README.md) lists them: `datasets` reads the card. Raises OSError
    where there are none.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

    folder = Path(path).expanduser()
    if folder.is_dir():
        if _has_card(folder):
            return {}
        base = str(folder.absolute())
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    else:
        found = DataFilesDict.from_patterns(sanitize_patterns(str(folder.absolute())))

    return {
        str(split): [Path(name) for name in names if Path(name).suffix.lower() not in _NOT_DATA]
        for split, names in found.items()
    }


def suffixes(files: Sequence[Path]) -> set[str]:
    """Return the suffixes of files; all JSON ones count as ".json"."""
    found = {file.suffix.lower() for file in files}
    return {".json" if suffix in json_rows.SUFFIXES else suffix for suffix in found}


def _has_card(folder: Path) -> bool:
    card = folder / "README.md"
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return text.startswith("---") and "data_files" in text
