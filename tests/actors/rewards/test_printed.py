"""What functions print, on its way into a log that stays bounded."""

import io
import json
import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest

from actors.rewards.printed import KEPT, KEPT_AT_START, LIMIT, Relay, shorten
from launch import reward_server
from launch.processes.children import TAIL_BYTES, ChildSpec, start
from tests.launch.test_reward_server import ask, dealer

SAMPLES = Path(__file__).with_name("sample_rewards.py")
LINES = [b"line %03d" % number for number in range(100)]  # with its end, 9 bytes each


@contextmanager
def opened(path: Path, mode: str) -> Generator[int]:
    with path.open(mode) as file:
        yield file.fileno()


def relayed(sink: int, data: list[bytes], *, limit: int, kept: int) -> None:
    """Copy the pieces, and wait until all have arrived."""
    source, writer = os.pipe()
    relay = Relay(source, sink, limit=limit, kept=kept)
    for piece in data:
        os.write(writer, piece)
    os.close(writer)
    relay.wait(30)


def test_a_log_is_shortened_to_whole_lines_and_says_how_much_was_dropped(tmp_path):
    path = tmp_path / "reward-0.log"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    with opened(path, "a+b") as log:
        shorten(log, 900)
        assert path.read_bytes() == b"\n".join(LINES) + b"\n"  # no longer than that
        shorten(log, 95)
        ten = b"\n".join(LINES[-10:]) + b"\n"
        assert path.read_bytes() == b"[810 bytes of earlier output were dropped here]\n" + ten
        os.write(log, b"appended\n")
        shorten(log, 20)
    assert path.read_bytes() == (
        b"[891 bytes of earlier output were dropped here]\nline 099\nappended\n"
    )


def test_one_endless_line_is_cut(tmp_path):
    path = tmp_path / "reward-0.log"
    path.write_bytes(b"x" * 300_000 + b"\n")
    with opened(path, "a+b") as log:
        shorten(log, 200_000)
    mark = b"[100001 bytes of earlier output were dropped here]\n"
    assert path.read_bytes() == mark + b"x" * 199_999 + b"\n"


def test_a_line_that_was_not_ended_stays_apart_from_what_the_server_says(tmp_path):
    path = tmp_path / "reward-0.log"
    source, writer = os.pipe()
    with opened(path, "a+b") as log:
        relay = Relay(source, log)
        os.write(writer, b"one\ntw")
        os.write(log, b"ERROR of the server\n")
        os.write(writer, b"o")
        os.close(writer)
        relay.wait(30)
    assert sorted(path.read_bytes().splitlines()) == [b"ERROR of the server", b"one", b"two"]


def test_what_the_server_logs_while_its_log_is_shortened_is_not_lost(tmp_path):
    path = tmp_path / "reward-0.log"
    source, writer = os.pipe()
    with path.open("a+b", buffering=0) as log:
        handler = logging.StreamHandler(io.TextIOWrapper(log, write_through=True))
        logging.getLogger().addHandler(handler)
        try:
            relay = Relay(source, log.fileno(), limit=3_000_000, kept=2_900_000)
            for number in range(300):
                os.write(writer, b"x" * 65_535 + b"\n")
                logging.getLogger("test").error("message %d of the server", number)
            os.close(writer)
            relay.wait(30)
        finally:
            logging.getLogger().removeHandler(handler)
        lines = path.read_bytes().splitlines()
        numbers = [int(line.split()[1]) for line in lines if line.startswith(b"message")]
        assert len(numbers) > 40
        assert numbers == list(range(300 - len(numbers), 300))


def test_a_log_never_stays_above_its_limit_and_the_newest_is_in_it(tmp_path):
    path = tmp_path / "reward-0.log"
    block = b"\n".join(LINES) + b"\n"
    with opened(path, "a+b") as log:
        relayed(log, [block] * 1000, limit=200_000, kept=100_000)
    data = path.read_bytes()
    assert 100_000 - 65_536 < len(data) <= 200_000
    first, rest = data.split(b"\n", 1)
    assert (block * 1000).endswith(rest)
    assert first == b"[%d bytes of earlier output were dropped here]" % (900_000 - len(rest))


@pytest.mark.parametrize("mode", ["wb", "ab", "w+b"])
def test_a_file_that_the_launcher_did_not_open_gets_everything(tmp_path, mode):
    path = tmp_path / "mine.log"
    with opened(path, mode) as log:
        relayed(log, [line + b"\n" for line in LINES], limit=400, kept=200)
    assert path.read_bytes() == b"\n".join(LINES) + b"\n"


def test_a_sink_that_takes_nothing_does_not_block_the_functions(tmp_path):
    source, sink = os.pipe()
    os.close(source)  # every write to it fails
    try:
        relayed(sink, [b"x" * 65_536] * 8, limit=400, kept=200)  # more than a pipe holds
    finally:
        os.close(sink)


@pytest.mark.anyio
async def test_the_log_of_a_server_stays_bounded_and_its_last_error_is_found(tmp_path):
    """A function prints twice the limit and raises; the server before it left a log, too."""
    assert KEPT - 65_536 > KEPT_AT_START + TAIL_BYTES  # see `start`
    log, endpoint = tmp_path / "reward-0.log", f"ipc://{tmp_path}/r"
    log.write_bytes(b"2026-01-02 03:04:05,678 ERROR of an earlier server\n" * 400_000)
    command = [sys.executable, reward_server.__file__, f"{SAMPLES}:prints_and_raises"]
    command += ["--bind", endpoint]
    child = await start(ChildSpec("reward-0", "reward server", [*command, "--child"]), tmp_path)
    assert KEPT_AT_START - 65_536 < child.log_start < KEPT_AT_START + 100
    try:
        assert child.log_ending() == ""
        faults = await anyio.to_thread.run_sync(faults_of, endpoint)
    finally:
        await child.end(20)
    assert faults == ["exception"]
    assert KEPT - 65_536 < log.stat().st_size <= LIMIT
    ending = child.log_ending().splitlines()
    assert ending[0].endswith("ERROR reward prints_and_raises: exception: Traceback (most recent "
                              "call last):")  # fmt: skip
    assert "ValueError: after all that" in ending  # what was printed before it may follow it
    with log.open("rb") as file:
        assert file.readline().endswith(b"bytes of earlier output were dropped here]\n")


def faults_of(endpoint: str) -> list[str]:
    with dealer(endpoint) as socket:
        assert ask(socket)["type"] == "progress"
        return [fault["kind"] for fault in json.loads(socket.recv())["faults"]]
