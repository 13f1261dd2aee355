"""One process, no socket: coordinator, actor worker, engine and trainer on a tiny model."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from actors import bridge_messages
from actors.engine.mlx_engine import MlxEngine
from actors.session import ActorIdentity, Session
from actors.worker import Worker
from learner.checkpoint import load_checkpoint
from learner.data.epochs import ListEpochs
from learner.data.filter import Report
from learner.data.prompts import Prompt, PromptSource
from learner.data.sets import Sets
from learner.ledger.ledger import Ledger
from learner.ledger.types import LedgerSettings
from learner.losses.metrics import number
from learner.objectives.completions import gather_completions
from learner.objectives.grpo import GrpoObjective
from learner.online.coordinator import Coordinator
from learner.online.experience import CoordinatorState, PromptGroup, TrainBatch
from learner.online.recovery import History
from learner.optim.step import Step
from learner.records import Records
from learner.trainer import Schedule, Trainer
from protocol.config.settings import (
    DataSettings,
    GrpoRewards,
    GrpoSettings,
    GrpoTrain,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    SamplingSettings,
)
from protocol.messages.arrays import floats_bytes
from protocol.messages.messages import ActorMessage, Policy, TaskKind
from protocol.messages.parts import RewardResult, Sampling
from protocol.model.policy import LoadedPolicy, load_policy
from protocol.model.snapshots import (
    apply_snapshot,
    load_trainable,
    read_snapshot,
    trainable,
    write_snapshot,
)
from tests.protocol.builders import a_welcome
from tests.tiny import VOCAB, write_model_folder

ACTOR = b"actor"
G = 4


class Loop:
    """The wire between the two, in memory, and the source that the trainer polls."""

    def __init__(self, made: Coordinator, learner: LoadedPolicy, folder: Path) -> None:
        self.made, self.learner, self.folder = made, learner, folder
        self.exhausted = False
        self.inbox: list[ActorMessage] = []
        self.events: list[bridge_messages.Event] = []
        self.paths: dict[int, Path] = {}
        self.batches: list[TrainBatch] = []
        self.now = 0.0
        self.worker: Worker | None = None

    # what the actor takes for its I/O thread

    def take_events(self) -> list[bridge_messages.Event]:
        events, self.events = self.events, []
        return events

    def put(self, command: bridge_messages.Command) -> None:
        match command:
            case bridge_messages.Send(message):
                self.inbox.append(message)
            case bridge_messages.FetchSnapshot(policy):
                data = self.paths[policy.version].read_bytes()
                self.events.append(bridge_messages.SnapshotFetched(policy, data))
            case bridge_messages.ScoreGroup(key=key, completion_ids=ids):
                values = [float(sum(t % 2 for t in row)) / len(row) for row in ids]
                reward = RewardResult(names=["odd"], rewards=floats_bytes(values))
                self.events.append(bridge_messages.GroupScored(key, reward, 0.0))
            case bridge_messages.UseRewards():
                pass

    # the trainer's source

    def poll(self, timeout_s: float = 0.0) -> TrainBatch | None:
        assert self.worker is not None
        self.now += 0.01
        self.worker.advance()
        inbox, self.inbox = self.inbox, []
        for message in inbox:
            self.made.receive(ACTOR, message, self.now)
        for _, message in self.made.connected.take_outgoing():
            self.events.append(bridge_messages.MessageReceived(message))
        batch = self.made.next_batch(self.now)
        if batch is not None:
            self.batches.append(batch)
        return batch

    def publish(self, version: int) -> None:
        path = self.folder / f"policy-{version}"
        written = write_snapshot(path, self.learner.model, version)
        self.paths[version] = path
        announced = Policy(version=version, digest=written.digest, size=written.size)
        self.made.publish(announced, self.now)

    def metrics(self) -> dict[str, float]:
        return self.made.metrics()

    def state(self) -> bytes:
        return msgspec.msgpack.encode(self.made.state(0))


class LoopIo:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def poll(self) -> list[bridge_messages.Event]:
        return self.loop.take_events()

    def put(self, command: bridge_messages.Command) -> None:
        self.loop.put(command)


def settings_of(folder: Path) -> ModelSettings:
    if not (folder / "model").exists():
        write_model_folder(folder / "model")
    lora = LoraSettings(rank=4)
    return ModelSettings(path=str(folder / "model"), dtype="float32", lora=lora)


def prompts() -> PromptSource:
    rng = np.random.default_rng(3)
    rows = [
        Prompt(row_key=i, prompt_ids=rng.integers(2, VOCAB, 4 + i % 3).tolist(), row={"prompt": ""})
        for i in range(10)
    ]
    epochs = ListEpochs(rows, DataSettings(), seed=1, batch_size=1)
    return PromptSource(Sets(epochs, [], Report("rows")), None)


def build(
    folder: Path, *, eta: int, temperature: float, length: int, batch: int, resume: bool = False
) -> tuple[Trainer[Any], Loop, GrpoObjective]:
    settings = settings_of(folder)
    learner, actor = load_policy(settings, seed=5), load_policy(settings, seed=5)
    incarnation = "L2" if resume else "L1"
    sampling = Sampling(num_generations=G, max_completion_length=length, temperature=temperature)
    limits = LedgerSettings(
        batch_size=batch, max_staleness=eta, num_generations=G, total_batches=None, lease_s=1e6
    )
    welcome = a_welcome(
        incarnation,
        model_digest=learner.model_digest,
        tokenizer_digest=learner.tokenizer_digest,
        seed=5,
    )
    checkpoint = load_checkpoint(folder / "run/checkpoints") if resume else None

    def coordinator_of(ledger: Ledger, source: PromptSource | None = None) -> Coordinator:
        kinds: dict[TaskKind, Sampling] = {"train": sampling, "eval": sampling}
        return Coordinator(
            ledger, source or prompts(), [], welcome, kinds, VOCAB, actor_timeout_s=1e6
        )

    if checkpoint is None:
        made = coordinator_of(Ledger.new(limits, "r", incarnation))
    else:
        state = msgspec.msgpack.decode(checkpoint.source, type=CoordinatorState)
        source = prompts()
        history = History.of_checkpoint(state, source, [])
        ledger = Ledger(limits, history.ledger)
        rejoined = ledger.begin_incarnation(incarnation, keep_groups=False).rejoined
        history.tasks.rejoin(rejoined, keep_groups=False)
        made = coordinator_of(ledger, source)
        made.restore(history)
        load_trainable(learner.model, checkpoint.weights, "checkpoint")
    loop = Loop(made, learner, folder)
    engine = MlxEngine(
        actor.model,
        stop_token_ids=actor.stop_token_ids,
        vocab_size=VOCAB,
        max_concurrent_completions=64,
    )
    session = Session(ActorIdentity("a0", "1", "here", actor.model_digest, actor.tokenizer_digest))
    loop.worker = Worker(
        engine, session, LoopIo(loop), decode=str,
        load=lambda _, data: lambda: apply_snapshot(actor.model, read_snapshot(data)),
        clock=lambda: loop.now,
    )  # fmt: skip
    loop.worker.start()

    def describe(item: PromptGroup, trained_at: int) -> dict[str, Any]:
        return {"kind": "train", "trained_at": trained_at, "task": item.group.task.number}

    train = GrpoTrain(batch_size=batch, micro_batch_size=2, length_bucket=8)
    objective = GrpoObjective(
        GrpoSettings(),
        train,
        SamplingSettings(temperature=temperature, max_completion_length=length),
        GrpoRewards(),
        learner.model,
        "full",
        describe,
    )
    step = Step(
        learner.model, OptimizerSettings(learning_rate=1e-2), total_steps=10, compiled=False
    )
    trainer: Trainer[Any] = Trainer(
        learner.model, loop, objective, step, Records(folder / "run", 0.0),
        Schedule(None, 2, 5, 0, eval_at_start=False),
    )  # fmt: skip
    if checkpoint is not None:
        trainer.restore(checkpoint)
    loop.publish(trainer.step)
    return trainer, loop, objective


def run_to(trainer: Trainer[Any], step: int) -> None:
    turns = 0
    while trainer.step < step:
        trainer.advance()
        turns += 1
        assert turns < 5000, "the round does not come to its end"


@pytest.mark.parametrize("eta", [0, 1])
def test_batches_train_in_queue_order_within_the_bound(tmp_path, eta):
    trainer, loop, _ = build(tmp_path, eta=eta, temperature=1.0, length=6, batch=2)
    before = {name: mx.array(value) for name, value in trainable(trainer.model).items()}
    run_to(trainer, 4)
    numbers = [item.group.task.number for batch in loop.batches for item in batch.groups]
    assert numbers == list(range(8))
    ages = [
        batch.trained_at - span.version
        for batch in loop.batches
        for item in batch.groups
        for completion in item.group.completions
        for span in completion.policy_spans
    ]
    assert max(ages) == eta
    after = trainable(trainer.model)
    moved = max(number(mx.abs(after[name] - value).max()) for name, value in before.items())
    assert 0.01 < moved < 0.06  # four steps of Adam at a learning rate of at most 0.01
    assert loop.made.metrics()["ledger/trained"] == 8


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampling_logprobs_are_those_of_the_learners_forward(tmp_path, temperature, capsys):
    trainer, loop, objective = build(tmp_path, eta=0, temperature=temperature, length=48, batch=16)
    batch = None
    for _ in range(2000):
        batch = batch or loop.poll()
    assert batch is not None
    gaps: list[np.ndarray] = []
    completions = gather_completions(batch.groups)
    count = len(completions.groups)
    for start in range(0, count, 8):
        index = list(range(start, start + 8))
        arrays = objective.arrays_of(completions, np.ones(count), index, {})
        ours = objective.scores(trainer.model, arrays).logprobs
        gap = np.abs(np.array(ours) - np.array(arrays["sampling_logprobs"]))
        gaps.append(gap[np.array(arrays["mask"]) > 0])
    flat = np.concatenate(gaps)
    with capsys.disabled():
        print(
            f"\nT={temperature}: {flat.size} tokens, mean {flat.mean():.2e}, max {flat.max():.2e}"
        )
    assert flat.size >= 1000
    assert flat.max() < 1e-4
    assert flat.mean() > 0


def test_a_resumed_run_samples_the_same_next_batch(tmp_path):
    trainer, loop, _ = build(tmp_path, eta=0, temperature=1.0, length=6, batch=2)
    run_to(trainer, 4)  # checkpoints at 2 and 4
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    again, second, _ = build(tmp_path, eta=0, temperature=1.0, length=6, batch=2, resume=True)
    assert again.step == 2
    run_to(again, 4)
    for ours, theirs in zip(second.batches, loop.batches[2:], strict=True):
        for one, other in zip(ours.groups, theirs.groups, strict=True):
            assert one.prompt == other.prompt
            assert [c.token_ids for c in one.group.completions] == [
                c.token_ids for c in other.group.completions
            ]
    final = trainable(again.model)
    for name, value in trainable(trainer.model).items():
        np.testing.assert_allclose(np.array(final[name]), np.array(value), atol=1e-6)
