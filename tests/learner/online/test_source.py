"""Which policies the source announces when a run begins, and when it is continued."""

from pathlib import Path
from typing import Any, cast

import mlx.nn as nn
import pytest

from learner.online.commands import Command, PublishPolicy, Reply, RestorePolicy
from learner.online.recovery import Recovered
from learner.online.source import OnlineSource, snapshot_path
from protocol.messages.messages import Policy
from protocol.model.snapshots import TensorDigests, trainable, write_snapshot
from protocol.transport.bridge import Bridge
from tests.tiny import tiny_model


class Sent:
    """A bridge that keeps what is put."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def put(self, command: Command) -> None:
        self.commands.append(command)


def begun(
    folder: Path, model: nn.Module, version: int, recovered: Recovered | None
) -> list[tuple[type[Any], int]]:
    """Return what a source announces that begins at `version`."""
    sent = Sent()
    bridge = cast(Bridge[Command, Reply], sent)
    OnlineSource(bridge, model, folder, recovered=recovered).begin(version)
    return [
        (type(command), command.policy.version)
        for command in sent.commands
        if isinstance(command, PublishPolicy | RestorePolicy)
    ]


@pytest.mark.parametrize(
    ("reached", "on_disk", "announced"),
    [
        (5, True, [(RestorePolicy, 5)]),  # a run that was stopped
        (5, False, [(PublishPolicy, 5)]),
        (7, True, [(RestorePolicy, 7)]),  # a learner that was killed
        (7, False, []),  # version 7 follows once it is reached
    ],
)
def test_a_continued_run_announces_its_newest_policy_once(
    tmp_path: Path, reached: int, on_disk: bool, announced: list[tuple[type[Any], int]]
):
    model = tiny_model()
    policy = None
    if on_disk:
        path = snapshot_path(tmp_path, reached)
        write_snapshot(path, model, reached)
        digest = TensorDigests.of(trainable(model)).whole
        policy = Policy(version=reached, digest=digest, size=1, path=str(path))
    recovered = Recovered(reached, announced=policy)
    assert begun(tmp_path, model, 5, recovered) == announced


def test_a_run_that_begins_announces_its_first_policy(tmp_path: Path):
    assert begun(tmp_path, tiny_model(), 0, None) == [(PublishPolicy, 0)]
    assert snapshot_path(tmp_path, 0).is_file()
