"""Which log messages of the learner reach the user, as events."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.processes.learner_program import ROWS_LOGGER, NoticeHandler
from launch.run_folder.tail import EventTail
from protocol.run_record import EVENT_LOGGER, EvaluationStarted, Notice, record_event


@pytest.fixture
def folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    """Give a run folder that gets the notices of every logger, as in the learner."""
    handler = NoticeHandler(tmp_path, "logs/learner.log")
    caplog.set_level(logging.INFO, "pippin")
    logging.getLogger().addHandler(handler)
    yield tmp_path
    logging.getLogger().removeHandler(handler)


def messages(tail: EventTail) -> list[tuple[str, str]]:
    return [(each.level, each.message) for each in tail.read() if isinstance(each, Notice)]


def test_messages_are_events_without_errors_and_without_events_themselves(folder: Path):
    log = logging.getLogger("pippin.learner")
    log.info("an earlier run")
    tail = EventTail(folder)
    log.info("%d rows kept", 3)
    log.debug("too much")
    log.error("shown at the end")
    logging.getLogger("library").info("not ours")
    assert messages(tail) == [("info", "3 rows kept")]
    log.warning("slow\nand in two lines")
    record_event(folder, EvaluationStarted(step=3))
    assert logging.getLogger(EVENT_LOGGER).isEnabledFor(logging.INFO)
    assert [event.text for event in tail.read()] == ["slow\nand in two lines", "evaluating step 3"]
    assert tail.read() == []
    assert EventTail(folder / "none").read() == []


def test_long_lists_of_bad_rows_are_cut_and_the_log_is_named(folder: Path):
    tail = EventTail(folder)
    rows = logging.getLogger(ROWS_LOGGER)
    for row in range(9):
        rows.info("    row %d: no chosen", row)
    logging.getLogger("pippin.data").info("  dropped for empty: 1")
    rows.info("    row 9: empty")
    assert [text for _, text in messages(tail)] == [
        *(f"    row {row}: no chosen" for row in range(5)),
        "    … all of them: logs/learner.log",
        "  dropped for empty: 1",
        "    row 9: empty",
    ]


def test_a_disk_that_takes_no_event_stops_nobody(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, EVENT_LOGGER)
    (tmp_path / "events.jsonl").mkdir()
    handler = NoticeHandler(tmp_path, "logs/learner.log")
    handler.emit(logging.makeLogRecord({"msg": "words", "levelno": logging.INFO}))
    record_event(tmp_path, EvaluationStarted(step=1))
    assert "events.jsonl cannot be written: " in caplog.messages[0]
    assert caplog.messages[1] == "evaluating step 1"
