"""Which policies the source announces when a run begins, and when it goes on after a recovery."""

from pathlib import Path
from typing import Any, cast

import mlx.nn as nn
import pytest

from learner.ledger.events import PolicyPublished
from learner.online.commands import Command, PublishPolicy, RestorePolicy
from learner.online.recovery import Recovered
from learner.online.source import OnlineSource
from protocol.model.snapshots import tensors_digest, trainable
from tests.protocol.builders import a_policy


class Sent:
    """Stands in for the bridge: keeps what is sent to the I/O thread."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def put(self, command: Command) -> None:
        self.commands.append(command)

    def versions(self) -> list[tuple[str, int]]:
        found = self.commands
        assert all(isinstance(each, PublishPolicy | RestorePolicy) for each in found)
        return [(type(each).__name__, cast(Any, each).policy.version) for each in found]


def source(folder: Path, recovered: Recovered | None) -> tuple[OnlineSource, Sent]:
    sent = Sent()
    return OnlineSource(cast(Any, sent), nn.Linear(2, 2), folder, None, recovered), sent


@pytest.mark.parametrize(
    ("reached", "announced", "step", "at_once", "later"),
    [
        # The newest checkpoint is what was reached, and its snapshot is there.
        (4, 4, 4, [("RestorePolicy", 4)], [("PublishPolicy", 5)]),
        # The same, without the snapshot.
        (4, None, 4, [("PublishPolicy", 4)], [("PublishPolicy", 5)]),
        # Two steps are taken again: actors go on with what they have meanwhile.
        (4, 4, 2, [("RestorePolicy", 4)], [("PublishPolicy", 5)]),
        (4, None, 2, [], [("PublishPolicy", 4), ("PublishPolicy", 5)]),
        # An evaluation held back the newest version.
        (4, 3, 2, [("RestorePolicy", 3)], [("PublishPolicy", 4), ("PublishPolicy", 5)]),
        (4, 3, 4, [("RestorePolicy", 3), ("PublishPolicy", 4)], [("PublishPolicy", 5)]),
    ],
)
def test_after_a_recovery_actors_can_work_as_early_as_possible(
    tmp_path: Path,
    reached: int,
    announced: int | None,
    step: int,
    at_once: list[tuple[str, int]],
    later: list[tuple[str, int]],
):
    policy = None if announced is None else a_policy(announced)
    made, sent = source(tmp_path, Recovered(reached, announced=policy))
    made.begin(step)
    assert sent.versions() == at_once
    sent.commands.clear()
    for version in range(step + 1, 6):
        made.publish(version)
    assert sent.versions() == later


def test_a_run_that_begins_announces_what_it_begins_with(tmp_path: Path):
    made, sent = source(tmp_path, None)
    made.begin(0)
    assert sent.versions() == [("PublishPolicy", 0)]


def test_weights_that_come_out_otherwise_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = nn.Linear(2, 2)
    same = tensors_digest(trainable(model))
    published = {
        version: PolicyPublished(version=version, digest=digest)
        for version, digest in ((1, same), (2, "other"), (3, "other"))
    }
    made = OnlineSource(cast(Any, Sent()), model, tmp_path, None, Recovered(4, published=published))
    for version in (1, 2, 3):
        made.publish(version)
    (record,) = caplog.records
    assert record.getMessage().startswith("step 2, trained again from the journal, gave other")
