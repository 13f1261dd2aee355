"""What the programs of a run do first: which messages are heard, and what asks them to stop."""

import logging
import os
import re
import signal
from pathlib import Path

from launch.processes.start import OUR_LOGGERS, start_log, start_process

ROOT = Path(__file__).resolve().parents[3]


def test_every_logger_of_ours_is_heard_and_no_other(monkeypatch):
    for name in OUR_LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    named = re.compile(r"getLogger\((__name__|\"[^\"]+\")\)")
    loggers: set[str] = set()
    for path in (file for folder in OUR_LOGGERS[1:] for file in (ROOT / folder).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        loggers |= {
            module if name == "__name__" else name.strip('"')
            for name in named.findall(path.read_text())
        }
    assert {
        "pippin.learner",
        "pippin.data",
        "learner.model.memory",
        "protocol.model.policy",
    } <= loggers
    start_log()
    assert [
        name for name in loggers if not logging.getLogger(name).isEnabledFor(logging.INFO)
    ] == []
    assert not logging.getLogger("datasets").isEnabledFor(logging.INFO)


def test_sigterm_asks_for_a_clean_stop(monkeypatch):
    for name in OUR_LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    before = signal.getsignal(signal.SIGTERM)
    try:
        lifeline = start_process(child=False, mlx=False)
        assert not lifeline.stop_requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert lifeline.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)
