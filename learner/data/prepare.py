"""What is done to a row before it is tokenised: renaming, the user's function, system prompt."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from learner.data.functions import load_function
from learner.data.rows import RawRow, Rows
from learner.data.tokens import Json, RowError
from protocol.config.settings import DataSettings
from protocol.errors import DataError, did_you_mean

PrepareFunction = Callable[[RawRow], RawRow | None]
_ALWAYS = ("prompt", "tools", "chat_template_kwargs")
PAIR_COLUMNS = (*_ALWAYS, "chosen", "rejected", "preference_score")
ANSWER_COLUMNS = (*_ALWAYS, "completion", "label", "chosen", "rejected")
SEQUENCE_COLUMNS = (*_ALWAYS, "completion", "messages", "text")
_PROMPTS = ("instruction", "question", "query", "input")  # what datasets call a prompt


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
            raise DataError(
                f"data.columns.{ours}: {rows.name} has no column {theirs!r}; it has "
                f"{sorted(rows.columns)}{did_you_mean(theirs, rows.columns)}"
            )
    function = (
        cast("PrepareFunction", load_function(settings.prepare, "data.prepare"))
        if settings.prepare
        else None
    )
    return Preparation(dict(settings.columns), function, settings.system_prompt)


def column_notes(settings: DataSettings, rows: Rows, reads: Sequence[str]) -> list[str]:
    """Say which columns nothing reads where training reads `reads`, and that a prompt is implicit.

    A function of the user's may read any column; nothing is said then. Raises DataError where
    data.columns gives a name that is nearly one of `reads`.
    """
    if settings.prepare:
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
            f"{rows.name}: nothing reads the columns {unread}; data.columns renames them, "
            "data.prepare makes rows of them"
        )
    if {"chosen", "rejected"} <= columns & set(reads) and "prompt" not in columns:
        note = f"{rows.name}: no column prompt: it is what chosen and rejected begin with alike"
        if unread:
            likely = next((name for name in _PROMPTS if name in unread), unread[0])
            note += (
                f"; if it stands in {likely}, set data.columns = {{prompt = {json.dumps(likely)}}}"
                "; if in several columns, join them in data.prepare"
            )
        notes.append(note)
    return notes


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
