"""Imports reward functions by names such as `package.module:function`.

Only the worker process does this, because importing a reward function runs its author's code.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from protocol.errors import RewardError
from protocol.messages.rewards import unique_names

_NAME = re.compile(r"(?P<where>.+?):(?P<attribute>[A-Za-z_][\w.]*)(?P<call>\(.*\))?", re.DOTALL)
ALWAYS_PASSED = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)


@dataclass(frozen=True)
class RewardFunction:
    """A reward function, its name in the columns of rewards, and whether it is asynchronous."""

    name: str
    call: Callable[..., Any]
    is_async: bool


def load_rewards(specs: Sequence[str]) -> list[RewardFunction]:
    """Import the named functions; raise `RewardError` that says what is missing, and where.

    A spec is `package.module:function` or `path/to/file.py:function`. A factory, or a class with
    callable instances, takes literal arguments: `trl.rewards:get_soft_overlong_punishment(100,
    20)`. A name that occurs again gets `_2`, `_3`, ... so that column names are unique.
    """
    if not specs:
        raise RewardError("rewards: required at least one function, got none; name one")

    functions = [_load(spec) for spec in specs]
    names = unique_names([function.name for function in functions])
    return [replace(f, name=name) for f, name in zip(functions, names, strict=True)]


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether a call returns a coroutine; sees through partials and instances, as TRL does."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - it is the method that is inspected
    )


def _load(spec: str) -> RewardFunction:
    match = _NAME.fullmatch(spec)
    if match is None:
        raise RewardError(
            f"reward {spec!r}: required package.module:function or path/to/file.py:function"
        )

    module = _module(spec, match["where"])
    value: Any = module
    for part in match["attribute"].split("."):
        if not hasattr(value, part):
            functions = [name for name, item in vars(module).items() if inspect.isfunction(item)]
            public = sorted(name for name in functions if not name.startswith("_"))
            raise RewardError(
                f"reward {spec!r}: {match['where']} has no {match['attribute']!r}; "
                f"it defines {', '.join(public) or 'no functions'}"
            )
        value = getattr(value, part)

    if match["call"] is not None:
        value = _construct(spec, value, match["call"])
    if inspect.isclass(value) or not callable(value):
        raise RewardError(
            f"reward {spec!r}: required a function, got {type(value).__name__}; "
            "a class or factory needs its arguments, such as module:Class()"
        )

    _check_signature(spec, value)
    name = _column_name(value, match["attribute"].rpartition(".")[2])
    return RewardFunction(name, value, _is_async(value))


def _module(spec: str, where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            return _file_module(spec, Path(where))
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError(
            f"reward {spec!r}: {where} cannot be imported: {type(error).__name__}: {error}; "
            "correct the name, or install what it needs"
        ) from error


def _file_module(spec: str, path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RewardError(f"reward {spec!r}: there is no file {path}; correct the path")

    # One module per path, so that two functions of one file share its globals.
    name = f"reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]

    definition = importlib.util.spec_from_file_location(name, path)
    if definition is None or definition.loader is None:
        raise RewardError(f"reward {spec!r}: {path} is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as for a script, so that it can import its neighbours

    module = importlib.util.module_from_spec(definition)
    sys.modules[name] = module
    definition.loader.exec_module(module)
    return module


def _construct(spec: str, factory: Callable[..., object], call: str) -> object:
    try:
        tree = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(tree, ast.Call):
            raise ValueError("not a call")
        args = [ast.literal_eval(argument) for argument in tree.args]
        kwargs = {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords}
    except (SyntaxError, ValueError) as error:
        raise RewardError(
            f"reward {spec!r}: arguments must be literals, such as (100, cache=20); got {call}"
        ) from error

    try:
        return factory(*args, **kwargs)
    except Exception as error:
        raise RewardError(
            f"reward {spec!r}: the factory raised {type(error).__name__}: {error}"
        ) from error


def _check_signature(spec: str, function: Callable[..., Any]) -> None:
    """Refuse a function that cannot take the arguments passed in every call."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin without a signature is checked when it is called
    try:
        signature.bind_partial(**dict.fromkeys(ALWAYS_PASSED))
    except TypeError as error:
        raise RewardError(
            f"reward {spec!r}: {error}. Every call passes {', '.join(ALWAYS_PASSED)} and every "
            f"other dataset column by keyword; add **kwargs to the signature, got {signature}"
        ) from error


def _column_name(function: Callable[..., Any], attribute: str) -> str:
    """Return `__name__`, as TRL does; for lambdas and unnamed callables, the name in the spec."""
    name = getattr(function, "__name__", None)
    return name if isinstance(name, str) and name != "<lambda>" else attribute
