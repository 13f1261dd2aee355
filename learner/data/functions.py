"""Functions that a recipe names: "path/to/file.py:function" or "package.module:function"."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from importlib.abc import Loader
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
    module = _file_module(place, key) if place.endswith(".py") else _named_module(place, key)
    function = getattr(module, attribute, None)
    if not callable(function):
        hint = did_you_mean(attribute, dir(module))
        raise DataError(f"{key}: {place} has no function {attribute!r}{hint}")
    return function


def _file_module(place: str, key: str) -> ModuleType:
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        raise DataError(f"{key}: no such file: {path}")
    name = f"pippin_prepare_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{key}: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look it up there
    loader = spec.loader
    return _imported(place, key, lambda: _executed(loader, module))


def _executed(loader: Loader, module: ModuleType) -> ModuleType:
    loader.exec_module(module)
    return module


def _named_module(place: str, key: str) -> ModuleType:
    return _imported(place, key, lambda: importlib.import_module(place))


def _imported(place: str, key: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except Exception as error:
        where = traceback.format_exc(limit=-1).strip()
        raise DataError(f"{key}: {place} cannot be imported: {where}") from error
