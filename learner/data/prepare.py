"""Prepares rows: renames columns, calls the user's function, adds the system prompt."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from learner.data.functions import load_function
from learner.data.rows import Json, Row, RowError, Rows
from protocol.config.settings import DataSettings
from protocol.errors import DataError, did_you_mean

PrepareFunction = Callable[[Row], Row | None]
_PROMPT_NAMES = ("instruction", "question", "query", "input")  # what datasets call a prompt


@dataclass(frozen=True)
class Preparation:
    """Turns a dataset's row into one with the columns that training reads.

    `columns` maps our names to the dataset's. Returns None for a row to leave out, and raises
    RowError for one that cannot be used.
    """

    columns: dict[str, str]
    function: PrepareFunction | None
    system_prompt: str

    def __call__(self, row: Row) -> Row | None:
        row = self._renamed(row)
        if self.function is not None:
            prepared = _call(self.function, row)
            if prepared is None:
                return None
            row = prepared
        return with_system_prompt(row, self.system_prompt) if self.system_prompt else row

    def _renamed(self, row: Row) -> Row:
        renamed = {key: value for key, value in row.items() if key not in self.columns.values()}
        for ours, theirs in self.columns.items():
            if theirs not in row:
                raise RowError("missing_column", f"no {theirs}; the row has {sorted(row)}")
            renamed[ours] = row[theirs]
        return renamed


def preparation(settings: DataSettings, rows: Rows) -> Preparation:
    """Return the preparation that `settings` ask for, checked against the columns of `rows`."""
    for ours, theirs in settings.columns.items():
        if theirs not in rows.columns:
            raise DataError(
                f"data.columns.{ours}: {rows.name} has no column {theirs!r}; it has "
                f"{sorted(rows.columns)}{did_you_mean(theirs, rows.columns)}"
            )

    function: PrepareFunction | None = None
    if settings.prepare:
        function = load_function(settings.prepare, "data.prepare")
    return Preparation(dict(settings.columns), function, settings.system_prompt)


def column_notes(settings: DataSettings, rows: Rows, reads: Sequence[str] | None) -> list[str]:
    """Return notes for the user: columns that nothing reads, and an implicit prompt.

    `reads`: the columns that training reads; None: any. There are no notes then, nor with
    data.prepare, which may read every column. Raises DataError if data.columns misspells one of
    `reads`.
    """
    if settings.prepare or reads is None:
        return []

    for ours in settings.columns:
        hint = did_you_mean(ours, reads, cutoff=0.8)
        if hint and ours not in reads:
            raise DataError(f"data.columns.{ours}: nothing reads a column {ours!r}{hint}")

    renamed = set(settings.columns.values())
    columns = (set(rows.columns) - renamed) | set(settings.columns)
    notes: list[str] = []
    unread = sorted(columns - set(reads))
    if unread:
        notes.append(
            f"{rows.name}: nothing reads the columns {unread}; rename them with data.columns, or "
            "make rows of them in data.prepare"
        )

    if {"chosen", "rejected"} <= columns & set(reads) and "prompt" not in columns:
        note = f"{rows.name}: no column prompt, so it is what chosen and rejected both begin with"
        if unread:
            likely = next((name for name in _PROMPT_NAMES if name in unread), unread[0])
            note += (
                f"; if it is in {likely}, set data.columns = {{prompt = {json.dumps(likely)}}}"
                "; if it is in several columns, join them in data.prepare"
            )
        notes.append(note)
    return notes


def _call(function: PrepareFunction, row: Row) -> Row | None:
    try:
        prepared = cast("object", function(row))  # the user's: it may return anything
    except Exception as error:
        raise RowError("prepare", f"data.prepare raised {type(error).__name__}: {error}") from error

    if prepared is not None and not isinstance(prepared, dict):
        raise DataError(
            f"data.prepare must return a dict or None, not {type(prepared).__name__}; fix "
            f"{getattr(function, '__name__', function)}"
        )
    return cast("Row | None", prepared)


def with_system_prompt(row: Row, system_prompt: str) -> Row:
    """Put a system message before the row's conversation, unless it has one.

    A string prompt becomes a user message, and string answers become assistant messages.
    """
    system = {"role": "system", "content": system_prompt}
    if "prompt" in row:
        changed: Row = {"prompt": _with_first(system, row["prompt"])}
        for column in ("chosen", "rejected", "completion"):
            if isinstance(row.get(column), str):
                changed[column] = [{"role": "assistant", "content": row[column]}]
        return {**row, **changed}

    # Without a prompt column, every conversation holds the prompt itself.
    changed = {
        column: _with_first(system, row[column])
        for column in ("messages", "chosen", "rejected")
        if isinstance(row.get(column), list)
    }
    if not changed:
        raise RowError("mixed_types", "data.system_prompt needs a prompt or a conversation")
    return {**row, **changed}


def _with_first(system: dict[str, str], prompt: Json) -> Json:
    if isinstance(prompt, str):
        return [system, {"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        return prompt  # refused, with its reason, when it is tokenised

    messages = cast("list[Json]", prompt)
    first = messages[0] if messages else None
    if isinstance(first, dict) and cast("Row", first).get("role") in ("system", "developer"):
        return messages
    return [system, *messages]
