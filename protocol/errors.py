"""Every error that Pippin raises on purpose, each class named after its cause.

Every message says what was required, what was got, where, and what to do next.
"""

import difflib
from collections.abc import Iterable
from typing import cast


class PippinError(Exception):
    """Base of every error that Pippin raises on purpose."""


class ConfigError(PippinError):
    """A configuration that cannot be run: unknown key, bad value, missing or clashing fields."""


class DataError(PippinError):
    """A dataset or row that cannot be used."""


class ModelError(PippinError):
    """A model or tokenizer that cannot be loaded or does not fit the request."""


class SnapshotError(PippinError):
    """Weights with other names, shapes, dtypes or another digest than required."""


class CheckpointError(PippinError):
    """A checkpoint that cannot be written, read, or resumed from."""


class JournalError(PippinError):
    """A journal that cannot be written, read, or continued from."""


class DiskError(PippinError):
    """A disk that did not take what the run cannot do without."""


class WireError(PippinError):
    """A message that cannot be accepted.

    `kind` says why: "oversized", "undecodable" (not msgpack), "unknown" (no message of this wire
    has that tag) or "invalid" (fields or sizes).
    """

    def __init__(self, message: str, *, kind: str = "invalid") -> None:
        super().__init__(message)
        self.kind = kind


class ChannelError(PippinError):
    """An endpoint that cannot be bound, connected or used."""


class RefusedError(PippinError):
    """A peer's refusal that trying again will not change."""


class RewardError(PippinError):
    """A reward function that cannot be imported, or that broke its contract."""


class TrainingError(PippinError):
    """Training that cannot continue, for example because gradients are never finite."""


class LedgerError(PippinError):
    """An event that the ledger's rules exclude: a bug in Pippin, never bad input."""


def did_you_mean(name: str, valid: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return "; did you mean 'x'?" for the valid name nearest to `name`, or "" if none is near."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def require(condition: bool, field: str, rule: str, got: object) -> None:
    """Raise ConfigError that names the field, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field} {rule}, got {got!r}")


def only_leaf(error: BaseException) -> BaseException:
    """Return the only exception inside nested groups, or the group itself if there are several."""
    while isinstance(error, BaseExceptionGroup):
        inner = cast("BaseExceptionGroup[BaseException]", error).exceptions
        if len(inner) != 1:
            break
        error = inner[0]
    return cast("BaseException", error)
