"""Where a learner goes on: from a checkpoint and the journal, whatever has become of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from learner.build.recover import (
    Continued,
    begin_run,
    continue_run,
    drop_segments,
    journal_folder,
    journal_identity,
)
from learner.checkpoint import Checkpoint
from learner.ledger.journal import JournalWriter, segment_name, segments
from learner.ledger.journal_reader import JournalReader
from learner.online.coordinator import Coordinator
from learner.online.experience import CoordinatorState
from protocol.config.settings import GrpoRun
from protocol.errors import JournalError
from protocol.messages.messages import Request
from tests.learner.small_run import (
    IDENTITY,
    LIMITS,
    A,
    B,
    G,
    coordinator_of,
    group,
    join,
    prompt,
    prompts,
    tasks,
)
from tests.protocol.builders import a_completion, a_policy


def checkpoint_of(made: Coordinator, journal: JournalWriter, step: int) -> Checkpoint:
    """Make a checkpoint as the service does: it begins a segment."""
    journal.append(made.drain_entries())
    state = made.state(journal.begin_segment(step), journal.identity.settings)
    source = msgspec.msgpack.encode(state)
    return Checkpoint(step, {}, {}, source, {})


def a_run(folder: Path, run: str = "r") -> tuple[Coordinator, Checkpoint]:
    """Train on a batch after the checkpoint of step 0, and form another; then the learner dies."""
    identity = msgspec.structs.replace(IDENTITY, run=run)
    continued = begin_run(folder, LIMITS, identity)
    made, journal = coordinator_of(continued.ledger), continued.journal
    checkpoint = checkpoint_of(made, journal, 0)
    made.publish(a_policy(0), 0.0)
    leased = join(made, free_completions=16)
    for task in leased[:2]:
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None
    made.publish(a_policy(1), 2.0)
    for task in leased[2:]:
        made.receive(A, group(task), 3.0)
    assert made.next_batch(3.0) is not None
    newest = [a_completion([5, 1], version=1)] * G
    made.receive(A, group(tasks(made, A)[0], completions=newest), 3.0)
    journal.append(made.drain_entries())
    journal.close()
    return made, checkpoint


def again(folder: Path, checkpoint: Checkpoint, **changes: str) -> tuple[Coordinator, Continued]:
    """Start the learner again."""
    identity = msgspec.structs.replace(IDENTITY, **changes)
    source = prompts()
    continued = continue_run(folder, checkpoint, LIMITS, identity, source)
    assert continued.history is not None
    made = coordinator_of(continued.ledger)
    made.prompts = source
    made.restore(continued.history)
    return made, continued


def test_the_same_incarnation_goes_on_where_the_journal_ends(tmp_path: Path):
    before, checkpoint = a_run(tmp_path)
    made, continued = again(tmp_path, checkpoint)
    assert made.ledger.state.incarnation == before.ledger.state.incarnation
    assert (
        msgspec.to_builtins(made.state(0))["tasks"] == msgspec.to_builtins(before.state(0))["tasks"]
    )
    recovered = continued.recovered
    assert recovered is not None
    assert (recovered.version, recovered.announced) == (1, None)
    assert [batch.trained_at for batch in recovered.batches] == [0, 1]
    # The actor that stayed up says Hello again: it keeps what it has.
    made.policy = a_policy(1)
    (open_lease,) = join(made, free_completions=0)
    assert open_lease.attempt == 1
    assert made.ledger.state.counters.leased == before.ledger.state.counters.leased


def test_after_a_start_of_the_machine_actors_begin_anew_and_groups_stay(tmp_path: Path):
    before, checkpoint = a_run(tmp_path)
    made, continued = again(tmp_path, checkpoint, boot="later")
    assert made.ledger.state.incarnation != before.ledger.state.incarnation
    recovered = continued.recovered
    assert recovered is not None
    # The batch in training is queued again, the one before it is trained on again.
    assert [batch.trained_at for batch in recovered.batches] == [0]
    assert [r.taken for r in made.ledger.state.queue.values()] == [1, 1, 1, None]
    made.publish(a_policy(1), 0.0)
    assert len(join(made, B, "b")) == 1
    batch = made.next_batch(0.0)
    assert batch is not None
    assert [item.prompt.row_key for item in batch.groups] == [2, 3]
    assert not (tmp_path / "lost.json").exists()


def test_other_settings_are_refused_where_steps_were_taken_since_the_checkpoint(tmp_path: Path):
    _, checkpoint = a_run(tmp_path)
    with pytest.raises(JournalError, match="1 steps were taken after the checkpoint of step 0"):
        again(tmp_path, checkpoint, settings="other")
    made, _ = again(tmp_path, checkpoint)  # nothing was touched
    assert made.ledger.state.version == 1


def a_stopped_run(folder: Path) -> Checkpoint:
    """Receive three groups, then stop with a checkpoint."""
    continued = begin_run(folder, LIMITS, IDENTITY)
    made, journal = coordinator_of(continued.ledger), continued.journal
    made.publish(a_policy(0), 0.0)
    for task in join(made)[:3]:
        made.receive(A, group(task), 1.0)
    checkpoint = checkpoint_of(made, journal, 0)
    journal.close()
    return checkpoint


def test_other_settings_after_a_stop_are_noticed_and_groups_sampled_again(tmp_path: Path):
    checkpoint = a_stopped_run(tmp_path)
    made, continued = again(tmp_path, checkpoint, settings="other")
    assert continued.recovered is None
    assert [r.taken for r in made.ledger.state.queue.values()] == [None] * 4
    lost = msgspec.json.decode((tmp_path / "lost.json").read_bytes())
    assert lost["reason"] == "the run goes on with other settings"
    assert len(lost["under_way"]["groups"]) == 3
    # The new history is appended, and can be continued in its turn.
    made.publish(a_policy(0), 0.0)
    continued.journal.append(made.drain_entries())
    continued.journal.close()
    state = msgspec.msgpack.decode(checkpoint.source, type=CoordinatorState)
    assert segments(journal_folder(tmp_path))[-1].name == segment_name(state.journal)


def test_actors_that_do_not_come_back_after_a_recovery_lose_their_tasks(tmp_path: Path):
    _, checkpoint = a_run(tmp_path)
    made, _ = again(tmp_path, checkpoint)
    made.policy = a_policy(1)
    assert join(made, B, "b") == []  # the only task is with actor a
    made.tick(0.0)
    made.receive(B, Request(free_completions=8), 30.0)
    made.tick(30.0)
    assert tasks(made, B) == []  # actor a may still come back
    made.tick(30.5)
    (task,) = tasks(made, B)
    assert task.attempt == 2


def test_groups_that_a_new_incarnation_kept_are_kept_by_its_checkpoints(tmp_path: Path):
    _, checkpoint = a_run(tmp_path)
    made, continued = again(tmp_path, checkpoint, boot="later")
    saved = checkpoint_of(made, continued.journal, 1)
    continued.journal.close()
    third, _ = again(tmp_path, saved, boot="later")
    third.publish(a_policy(1), 0.0)
    batch = third.next_batch(0.0)
    assert batch is not None
    assert [item.prompt.row_key for item in batch.groups] == [2, 3]
    assert {item.group.task.incarnation for item in batch.groups} == {
        third.ledger.state.incarnation
    }


def test_damage_ends_the_recovery_there_and_says_what_was_lost(tmp_path: Path):
    before, checkpoint = a_run(tmp_path)
    (_, path) = segments(journal_folder(tmp_path))
    entries = [entry for _, entry in JournalReader(journal_folder(tmp_path))]
    consumed = [type(entry).__name__ for entry in entries].index("BatchConsumed")
    # Damage the entry before the batch was consumed: the frames after it can still be read.
    data = bytearray(path.read_bytes())
    at = data.index(msgspec.msgpack.encode(entries[consumed]))
    data[at + 3] ^= 0xFF
    path.write_bytes(data)

    made, continued = again(tmp_path, checkpoint)
    assert made.ledger.state.incarnation != before.ledger.state.incarnation
    assert made.ledger.state.version == 0
    assert [r.taken for r in made.ledger.state.queue.values()] == [1, 1, None, None]
    lost = msgspec.json.decode((tmp_path / "lost.json").read_bytes())
    assert "does not have its checksum" in lost["reason"]
    assert len(lost["received_since"]) == 3
    assert continued.recovered is not None
    assert list(continued.recovered.batches) == []


def test_every_prefix_of_the_journal_can_be_continued(tmp_path: Path):
    """A kill between any two writes: the recovered ledger can go on."""
    _, checkpoint = a_run(tmp_path)
    (_, path) = segments(journal_folder(tmp_path))
    data = path.read_bytes()
    reached: set[int] = set()
    for size in range(0, len(data), 13):
        path.write_bytes(data[:size])
        made, continued = again(tmp_path, checkpoint)
        assert continued.recovered is not None
        reached.add(continued.recovered.version)
        formed = continued.recovered.batches
        assert [batch.trained_at for batch in formed] == list(range(len(formed)))
        assert len(formed) in (made.ledger.state.version, made.ledger.state.version + 1)
    assert reached == {0, 1}


@pytest.mark.parametrize("name", ["model_digest", "tokenizer_digest"])
def test_the_journal_of_another_model_is_refused_by_name(tmp_path: Path, name: str):
    _, checkpoint = a_run(tmp_path)
    with pytest.raises(JournalError, match=f"whose {name} is z, as the checkpoint's; got"):
        again(tmp_path, checkpoint, **{name: "z"})


def test_the_journal_of_another_run_is_refused_by_name(tmp_path: Path):
    _, checkpoint = a_run(tmp_path / "one", "one")
    a_run(tmp_path / "two", "two")
    with pytest.raises(JournalError, match="whose run is one, as the checkpoint's; got one whose"):
        again(tmp_path / "two", checkpoint)


def test_an_older_checkpoint_and_a_longer_journal_lead_to_the_same(tmp_path: Path):
    continued = begin_run(tmp_path, LIMITS, IDENTITY)
    made, journal = coordinator_of(continued.ledger), continued.journal
    older = checkpoint_of(made, journal, 0)
    made.publish(a_policy(0), 0.0)
    for task in join(made)[:3]:
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None
    made.publish(a_policy(1), 2.0)
    newer = checkpoint_of(made, journal, 1)
    journal.append(made.drain_entries())
    journal.close()

    states: list[object] = []
    for checkpoint, batches in ((older, 1), (newer, 0)):
        each, found = again(tmp_path, checkpoint)
        assert found.recovered is not None
        assert len(found.recovered.batches) == batches
        states.append(msgspec.to_builtins(each.state(0)))
    assert states[0] == states[1]


def saved_steps(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / "checkpoints" / f"step-{step:06d}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "state.json").touch()


@pytest.mark.parametrize(("keep", "left"), [(1, 1), (2, 2), (9, 3)])
def test_segments_that_no_kept_checkpoint_needs_are_dropped(tmp_path: Path, keep: int, left: int):
    continued = begin_run(tmp_path, LIMITS, IDENTITY)
    made, journal = coordinator_of(continued.ledger), continued.journal
    for step in range(3):
        checkpoint_of(made, journal, step)
        made.ledger.end_of_rows(0.0) if step == 0 else made.ledger.join_eval([step], 0, 0.0)
        if step == 0:
            made.ledger.published(0, "d0")
        else:
            made.ledger.state.evals.clear()
        journal.append(made.drain_entries())
    saved_steps(tmp_path, 0, 1, 2)
    before = segments(journal_folder(tmp_path))
    drop_segments(tmp_path, keep)
    assert segments(journal_folder(tmp_path)) == before[-left:]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"rewards": {"functions": ["other.py:f"], "reward_weights": [1.0]}}, True),
        ({"rewards": {"functions": ["a.py:f"], "reward_weights": [2.0]}}, False),
        ({"optimizer": {"learning_rate": 0.5}}, False),
        ({"eval": {"steps": 7}}, True),
    ],
)
def test_settings_that_recorded_batches_train_by_are_told_apart(
    tmp_path: Path, change: dict[str, Any], same: bool
):
    base = {
        "model": {"path": "m"},
        "data": {"path": "d.jsonl"},
        "rewards": {"functions": ["a.py:f"], "reward_weights": [1.0]},
        "train": {"max_steps": 3},
    }
    policy: Any = SimpleNamespace(model_digest="m", tokenizer_digest="t")
    before, after = (
        journal_identity(tmp_path, msgspec.convert(values, GrpoRun), policy).settings
        for values in (base, {**base, **change})
    )
    assert (before == after) is same


def test_an_evaluation_whose_policy_is_gone_does_not_hold_up_the_next(tmp_path: Path):
    """Newer policies wait for its end, and nobody could answer it."""
    continued = begin_run(tmp_path, LIMITS, IDENTITY)
    made, journal = coordinator_of(continued.ledger, [prompt(40)]), continued.journal
    checkpoint = checkpoint_of(made, journal, 0)
    made.publish(a_policy(0), 0.0)
    made.evaluate(0, 0.0)
    join(made, free_completions=16)
    journal.append(made.drain_entries())
    journal.close()

    source = prompts(held_out=[prompt(40)])  # policy/ has no snapshot of version 0
    after = continue_run(tmp_path, checkpoint, LIMITS, IDENTITY, source)
    assert after.recovered is not None
    assert after.recovered.announced is None
    assert after.ledger.state.evals == {}
    again = coordinator_of(after.ledger, [prompt(40)])
    again.publish(a_policy(0), 1.0)
    assert again.ledger.state.published == 0
