"""Functions that a recipe names: "path/to/file.py:function" or "package.module:function".

Reward functions have a loader of their own (`actors/rewards/loader.py`), which also takes factories
and checks signatures; actors and learner do not import each other.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from protocol.errors import DataError, did_you_mean


def load_function(name: str, key: str) -> Callable[..., Any]:
    """Import "file.py:function" or "package.module:function"; errors name the setting `key`."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise DataError(
            f"{key} {name!r}: give 'path/to/file.py:function' or 'package.module:function'"
        )

    module = _module(place, key)
    function = getattr(module, attribute, None)
    if not callable(function):
        hint = did_you_mean(attribute, dir(module))
        raise DataError(f"{key}: {place} has no function {attribute!r}{hint}")
    return function


def _module(place: str, key: str) -> ModuleType:
    path = Path(place).expanduser().absolute() if place.endswith(".py") else None
    if path is not None and not path.is_file():
        raise DataError(f"{key}: no such file: {path}")

    try:
        return importlib.import_module(place) if path is None else _run_file(path)
    except Exception as error:
        where = traceback.format_exc(limit=-1).strip()
        raise DataError(f"{key}: {place} cannot be imported: {where}") from error


def _run_file(path: Path) -> ModuleType:
    name = f"pippin_prepare_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")

    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look it up there
    spec.loader.exec_module(module)
    return module
