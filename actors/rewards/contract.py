"""TRL 1.16.0's contract with a reward function: its arguments, and what it may return.

f(prompts=, completions=, completion_ids=, <every other column>=, trainer_state=, log_extra=,
log_metric=) returns exactly N values, each a float or None. It is called once per group, with the N
completions of that group.
"""

import asyncio
import inspect
import itertools
import reprlib
import traceback
from collections.abc import Iterable
from typing import Any, cast

import msgspec
import numpy as np

from actors.rewards.loader import RewardFunction
from protocol.errors import RewardError
from protocol.messages.limits import LOG_METRICS, NAME_CHARS, TEXT_CHARS
from protocol.messages.rewards import RewardFault, ScoreRequest

_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class RewardOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result of one function for a group: N rewards, or a fault.

    `where` the fault arose is for the log, which has each place only once.
    """

    rewards: list[float | None] | None = None
    fault: RewardFault | None = None
    where: str = ""
    traceback: str = ""
    log_extra: dict[str, list[Any]] = {}
    log_metric: dict[str, list[float]] = {}


class TrainerState:
    """The trainer's state as attributes: `global_step`, `max_steps`, `epoch` and others."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update({"global_step": 0, "max_steps": 0, "epoch": 0.0} | values)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the trainer sent
        raise AttributeError(f"trainer_state has no {name!r}; it has {', '.join(vars(self))}")


class RewardCall:
    """One call of one function for one group: its arguments, what it logged, its outcome."""

    def __init__(self, index: int, function: RewardFunction, request: ScoreRequest) -> None:
        self.index = index
        self.function = function
        self.count = len(request.completions)
        self._log_extra: dict[str, list[Any]] = {}
        self._log_metric: dict[str, list[float]] = {}
        self.arguments: dict[str, Any] = {
            **request.columns,
            "prompts": request.prompts,
            "completions": request.completions,
            "completion_ids": request.completion_ids,
            "trainer_state": TrainerState(request.trainer_state),
            "log_extra": self._extra,
            "log_metric": self._metric,
        }

    def run(self) -> RewardOutcome:
        try:
            self._check_signature()
            return self._outcome(self.function.call(**self.arguments))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - its author may raise anything
            return self._fault(error)

    async def run_async(self) -> RewardOutcome:
        try:
            self._check_signature()
            return self._outcome(await self.function.call(**self.arguments))
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 - as above
            return self._fault(error)

    def _check_signature(self) -> None:
        try:
            signature = inspect.signature(self.function.call)
        except (TypeError, ValueError):
            return
        try:
            signature.bind(**self.arguments)
        except TypeError as error:
            raise RewardError(
                f"reward function {self.function.name}{signature}: {error}; it is called with "
                f"{', '.join(sorted(self.arguments))}: add **kwargs for those it does not use, "
                "and name columns as the dataset does"
            ) from error

    def _extra(self, column: str, values: Iterable[Any]) -> None:
        self._log_extra.setdefault(str(column), []).extend(_plain(value) for value in values)

    def _metric(self, name: str, value: float) -> None:
        number, name = float(value), str(name)
        new = name not in self._log_metric
        if len(name) > NAME_CHARS or (new and len(self._log_metric) >= LOG_METRICS):
            raise RewardError(
                f"reward function {self.function.name!r}: log_metric takes at most {LOG_METRICS} "
                f"names of at most {NAME_CHARS} characters for one group, got {name[:40]!r}; log "
                "fewer, or give it a shorter name"
            )
        if abs(number) <= _MAX_FLOAT32:  # a mean over infinities or NaN is useless
            self._log_metric.setdefault(name, []).append(number)

    def _outcome(self, returned: object) -> RewardOutcome:
        rewards = check_rewards(self.function.name, returned, self.count)
        return RewardOutcome(
            rewards=rewards, log_extra=self._log_extra, log_metric=self._log_metric
        )

    def _fault(self, error: BaseException) -> RewardOutcome:
        name = self.function.name
        if isinstance(error, RewardError):
            message = str(error)[:TEXT_CHARS]
            fault = RewardFault(function=name, kind="contract", message=message)
            return RewardOutcome(fault=fault, where=name)

        # The first frame is our own call of the function.
        frames = error.__traceback__.tb_next if error.__traceback__ else None
        places = traceback.extract_tb(frames)
        place = f"{places[-1].filename}:{places[-1].lineno}" if places else name
        shown = "".join(traceback.format_exception(type(error), error, frames))

        kind = type(error).__name__
        message = f"{kind}: {error} ({place})"[:TEXT_CHARS]
        return RewardOutcome(
            fault=RewardFault(function=name, kind="exception", message=message),
            where=f"{kind} at {place}",
            traceback=shown[-20_000:],
        )


def check_rewards(name: str, returned: object, count: int) -> list[float | None]:
    """Return `count` rewards, each a float or None; raise `RewardError` that names the function.

    NaN means None, as in TRL. Booleans and the scalars of numpy and torch count as numbers;
    strings and infinities are refused.
    """
    if inspect.iscoroutine(returned):
        returned.close()
        raise RewardError(
            f"reward function {name!r} returned a coroutine; declare it with `async def`"
        )
    if isinstance(returned, str | bytes | dict) or not isinstance(returned, Iterable):
        raise RewardError(
            f"reward function {name!r}: required a list of {count} floats or None, "
            f"got {type(cast(object, returned)).__name__} {reprlib.repr(cast(object, returned))}"
        )

    # One more than required, so that an endless generator is refused and not exhausted.
    values = list(itertools.islice(cast(Iterable[object], returned), count + 1))
    if len(values) != count:
        got = f"more than {count}" if len(values) > count else str(len(values))
        raise RewardError(
            f"reward function {name!r} returned {got} rewards, but {count} were required: one per "
            "completion, with None for those that it does not score"
        )

    return [_reward(name, index, value) for index, value in enumerate(values)]


def _reward(name: str, index: int, value: Any) -> float | None:  # noqa: ANN401 - checked here
    if value is None:
        return None

    number: float | None = None
    if not isinstance(value, str | bytes | bytearray) and getattr(value, "shape", ()) == ():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = None

    if number is None:
        raise RewardError(
            f"reward function {name!r}: reward {index} must be a float or None, "
            f"got {type(value).__name__} {reprlib.repr(value)}"
        )
    if number != number:
        return None
    if abs(number) > _MAX_FLOAT32:
        raise RewardError(
            f"reward function {name!r}: reward {index} must be finite in float32, got {number}"
        )
    return number


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a function logs
    """Return the value as JSON can hold it; anything else becomes text."""
    item = getattr(value, "item", None)
    try:
        plain = item() if callable(item) else value
        return msgspec.json.decode(msgspec.json.encode(plain))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return str(value)[:TEXT_CHARS]
