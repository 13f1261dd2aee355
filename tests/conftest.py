"""What tests of every folder use: the event loop of asynchronous tests, a folder for sockets."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.transport.endpoints import ipc_folder


@pytest.fixture
def anyio_backend() -> str:
    """Name the only backend of the program."""
    return "asyncio"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Make a folder whose path is short enough for sockets."""
    with ipc_folder() as path:
        yield path
