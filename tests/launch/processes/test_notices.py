"""Which log messages of the learner reach the user, as events."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.pages.progress import Progress
from launch.processes.learner_program import ROWS_LOGGER, NoticeHandler
from launch.run_folder.tail import EventTail
from learner.ledger.ledger import Ledger
from learner.ledger.types import LedgerSettings
from learner.online.run_watch import RunWatch
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


def test_a_run_without_actors_is_an_event_that_the_display_shows_once(folder: Path):
    tail, out = EventTail(folder), io.StringIO()
    ledger = Ledger.new(LedgerSettings(batch_size=1, max_staleness=0, num_generations=2), "r", "L1")
    watch = RunWatch()
    with Progress(folder, out=out) as progress:
        watch.started(0.0)
        for now in (61.0, 62.0, 63.0):
            watch.tick(ledger, 0, now)
            progress.update()
        watch.tick(ledger, 1, 70.0)
    told = [
        "no actor has been connected for 61 s, so nothing is sampled: look at the logs of the "
        "actors, or start one with launch/actor.py",
        "the run goes on: an actor is connected again after 70 s",
    ]
    assert messages(tail) == [("warning", told[0]), ("info", told[1])]
    assert out.getvalue().splitlines()[1:] == told


def test_a_disk_that_takes_no_event_stops_nobody(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, EVENT_LOGGER)
    (tmp_path / "events.jsonl").mkdir()
    handler = NoticeHandler(tmp_path, "logs/learner.log")
    handler.emit(logging.makeLogRecord({"msg": "words", "levelno": logging.INFO}))
    record_event(tmp_path, EvaluationStarted(step=1))
    assert "events.jsonl cannot be written: " in caplog.messages[0]
    assert caplog.messages[1] == "evaluating step 1"
