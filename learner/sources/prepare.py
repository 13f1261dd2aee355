"""What is done to a row before it is tokenised: renaming, the user's function, system prompt."""

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import Loader
from pathlib import Path
from types import ModuleType
from typing import cast

from learner.sources.dataset import RawRow, Rows
from protocol.errors import DataError
from protocol.settings import DataSettings
from protocol.tokens import Json, RowError

PrepareFunction = Callable[[RawRow], RawRow | None]


@dataclass(frozen=True)
class Preparation:
    """Turns raw rows into the rows that we know.

    `columns` maps our names to the dataset's. Calling returns None for a row to leave out, and
    raises RowError for one that cannot be used.
    """

    columns: dict[str, str]
    function: PrepareFunction | None
    system_prompt: str

    def __call__(self, raw: RawRow) -> RawRow | None:
        row = self._renamed(raw)
        if self.function is not None:
            prepared = _call(self.function, row)
            if prepared is None:
                return None
            row = prepared
        return with_system_prompt(row, self.system_prompt) if self.system_prompt else row

    def _renamed(self, raw: RawRow) -> RawRow:
        row = {key: value for key, value in raw.items() if key not in self.columns.values()}
        for ours, theirs in self.columns.items():
            if theirs not in raw:
                raise RowError("missing_column", f"no {theirs}; the row has {sorted(raw)}")
            row[ours] = raw[theirs]
        return row


def preparation(settings: DataSettings, rows: Rows) -> Preparation:
    """Build the preparation that `settings` ask for, checked against the columns of `rows`."""
    for ours, theirs in settings.columns.items():
        if theirs not in rows.columns:
            near = difflib.get_close_matches(theirs, rows.columns, n=1)
            raise DataError(
                f"data.columns.{ours}: {rows.name} has no column {theirs!r}; it has "
                f"{sorted(rows.columns)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    function = load_function(settings.prepare) if settings.prepare else None
    return Preparation(dict(settings.columns), function, settings.system_prompt)


def load_function(name: str) -> PrepareFunction:
    """Import "file.py:function" or "package.module:function"."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise DataError(
            f"data.prepare {name!r}: give 'path/to/file.py:function' or 'package.module:function'"
        )
    module = _file_module(place) if place.endswith(".py") else _named_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        raise DataError(
            f"data.prepare: {place} has no function {attribute!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return cast("PrepareFunction", function)


def _file_module(place: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        raise DataError(f"data.prepare: no such file: {path}")
    name = f"pippin_prepare_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"data.prepare: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look it up there
    loader = spec.loader
    return _imported(place, lambda: _executed(loader, module))


def _executed(loader: Loader, module: ModuleType) -> ModuleType:
    loader.exec_module(module)
    return module


def _named_module(place: str) -> ModuleType:
    return _imported(place, lambda: importlib.import_module(place))


def _imported(place: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except Exception as error:
        where = traceback.format_exc(limit=-1).strip()
        raise DataError(f"data.prepare: {place} cannot be imported: {where}") from error


def _call(function: PrepareFunction, row: RawRow) -> RawRow | None:
    try:
        prepared = function(row)
    except Exception as error:
        raise RowError("prepare", f"data.prepare raised {type(error).__name__}: {error}") from error
    if prepared is not None and not isinstance(prepared, dict):
        raise DataError(
            f"data.prepare must return a dict or None, not {type(prepared).__name__}; mend "
            f"{getattr(function, '__name__', function)}"
        )
    return prepared


def with_system_prompt(row: RawRow, system_prompt: str) -> RawRow:
    """Put a system message before the row's conversation, unless it has one.

    A string prompt becomes a user message, and string answers assistant messages.
    """
    system = {"role": "system", "content": system_prompt}
    if "prompt" in row:
        changed = {"prompt": _opened(row["prompt"], system)}
        for column in ("chosen", "rejected", "completion"):
            if isinstance(row.get(column), str):
                changed[column] = [{"role": "assistant", "content": row[column]}]
        return {**row, **changed}
    opened = {
        column: _opened(row[column], system)
        for column in ("messages", "chosen", "rejected")
        if isinstance(row.get(column), list)
    }
    if not opened:
        raise RowError("mixed_types", "data.system_prompt needs a prompt or a conversation")
    return {**row, **opened}


def _opened(prompt: Json, system: dict[str, str]) -> Json:
    if isinstance(prompt, str):
        return [system, {"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        return prompt  # refused, with its reason, when it is tokenised
    first = prompt[0] if prompt else None
    if isinstance(first, dict) and first.get("role") in ("system", "developer"):
        return prompt
    return [system, *prompt]
