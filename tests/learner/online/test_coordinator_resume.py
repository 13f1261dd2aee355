"""What a resumed coordinator keeps of its checkpoint, and what its journal says was lost."""

from learner.ledger.journal import encode_line, losses_since_checkpoint, read_journal
from learner.ledger.ledger import Ledger
from learner.online.coordinator import Coordinator
from learner.online.experience import CoordinatorState
from tests.learner.small_run import LIMITS, A, coordinator, coordinator_of, group, join
from tests.protocol.builders import a_policy


def resumed(state: CoordinatorState) -> tuple[Coordinator, object]:
    ledger, lost = Ledger.restore(LIMITS, state.ledger, "L2")
    made = coordinator_of(ledger)
    made.restore(state, lost)
    return made, lost


def test_a_checkpoint_while_a_batch_is_formed_keeps_its_rows_and_seeds():
    made = coordinator()
    leased = join(made)
    for task in leased[:3]:
        made.receive(A, group(task), 1.0)
    assert made.next_batch(1.0) is not None  # formed, not consumed: a stop saves now
    again, _ = resumed(made.state())
    again.publish(a_policy(0), 0.0)
    new = join(again)
    assert [t.row for t in new] == [t.row for t in leased]
    assert [t.seed for t in new] == [t.seed for t in leased]
    assert [t.task.number for t in new] == [4, 5, 6, 7]
    assert {t.task.incarnation for t in new} == {"L2"}


def test_what_was_lost_is_read_from_the_journal(tmp_path):
    made = coordinator()
    leased = join(made)
    journal = tmp_path / "ledger.jsonl"
    journal.write_bytes(b"".join(encode_line("L1", e) for e in made.drain_journal()))
    state = made.state()
    for task in leased[:3]:
        made.receive(A, group(task), 1.0)
    made.next_batch(1.0)
    made.publish(a_policy(1), 2.0)  # two rows more join
    with journal.open("ab") as file:
        file.writelines(encode_line("L1", e) for e in made.drain_journal())
        file.write(b'{"incarnation":"L1","ev')  # killed in the middle of a line
    events = read_journal(journal, "L1")[state.events :]
    _, report = Ledger.restore(LIMITS, state.ledger, "L2")
    lost = losses_since_checkpoint(report, state.ledger, events)
    assert (lost.version, lost.version_reached) == (0, 1)
    assert [t.number for t in lost.trained_since] == [0, 1]
    assert [t.number for t in lost.received_since] == [2]
    assert [t.number for t in lost.joined_since] == [4, 5]
    assert len(lost.checkpoint.leases) == 4
    assert read_journal(journal, "L0") == []
