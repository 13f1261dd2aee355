"""A coordinator of a run of three batches of two groups, and actors that a test plays by hand."""

from collections.abc import Sequence
from typing import Any

from learner.data.epochs import ListEpochs
from learner.data.filter import Report
from learner.data.prompts import Prompt, PromptSource
from learner.data.sets import Sets
from learner.ledger.journal import JournalIdentity
from learner.ledger.ledger import Ledger
from learner.ledger.types import LedgerSettings
from learner.online.coordinator import Coordinator
from protocol.config.settings import DataSettings
from protocol.messages.messages import PROTOCOL_VERSION, Group, Hello, Request, Task, TaskKind
from protocol.messages.parts import Sampling
from tests.protocol.builders import a_completion, a_group, a_policy, a_welcome

A, B = b"a", b"b"
G = 2


def prompt(number: int) -> Prompt:
    """Make row `number` of the dataset."""
    return Prompt(row_key=number, prompt_ids=[2, 3 + number], row={"prompt": f"p{number}"})


def prompts(count: int = 8, held_out: Sequence[Prompt] = ()) -> PromptSource:
    """Make the training rows, in order, and held-out ones."""
    settings = DataSettings(order="sequential")
    rows = [prompt(number) for number in range(count)]
    epochs = ListEpochs(rows, settings, seed=0, batch_size=1)
    return PromptSource(Sets(epochs, list(held_out), Report("rows")), None)


IDENTITY = JournalIdentity(
    run="r", model_digest="m", tokenizer_digest="t", settings="s", boot="now"
)
LIMITS = LedgerSettings(
    batch_size=2, max_staleness=1, num_generations=G, total_batches=3, lease_s=60.0
)
SAMPLING: dict[TaskKind, Sampling] = {
    "train": Sampling(num_generations=G, max_completion_length=4),
    "eval": Sampling(num_generations=1, max_completion_length=4, temperature=0.0),
}


def coordinator_of(ledger: Ledger, held_out: Sequence[Prompt] = ()) -> Coordinator:
    """Make the coordinator of a ledger."""
    welcome = a_welcome(ledger.state.incarnation)
    return Coordinator(ledger, prompts(), list(held_out), welcome, SAMPLING, vocab_size=64)


def coordinator(*, eval_rows: int = 0) -> Coordinator:
    """Make a coordinator that has announced version 0."""
    held_out = [prompt(40 + number) for number in range(eval_rows)]
    made = coordinator_of(Ledger.new(LIMITS, "r", "L1"), held_out)
    made.publish(a_policy(0), 0.0)
    return made


def hello(name: str = "a", incarnation: str = "1", **changes: object) -> Hello:
    """Make an actor's first word."""
    fields = {
        "protocol_version": PROTOCOL_VERSION,
        "model_digest": "m",
        "tokenizer_digest": "t",
        **changes,
    }
    return Hello(actor_id=name, actor_incarnation=incarnation, **fields)  # type: ignore[arg-type]


def group(task: Task, name: str = "a", **changes: Any) -> Group:
    """Make the finished task of an actor, sampled by version 0."""
    completions = [a_completion([5, 1], version=0)] * task.sampling.num_generations
    fields = {"attempt": task.attempt, "actor_id": name, "completions": completions} | changes
    return a_group(task=task.task, **fields)


def said(made: Coordinator, peer: bytes) -> list[object]:
    """Take what was sent, and return what this peer got."""
    return [message for to, message in made.connected.take_outgoing() if to == peer]


def tasks(made: Coordinator, peer: bytes) -> list[Task]:
    """Take what was sent, and return this peer's leases."""
    return [message for message in said(made, peer) if isinstance(message, Task)]


def join(
    made: Coordinator, peer: bytes = A, name: str = "a", free_completions: int = 8
) -> list[Task]:
    """Have an actor join with room for `free_completions` completions; return its leases."""
    made.receive(peer, hello(name), 0.0)
    made.receive(peer, Request(free_completions=free_completions), 0.0)
    return tasks(made, peer)
