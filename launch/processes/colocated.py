"""The actor of a run with `actors.colocate`: a worker in the learner's process.

    main thread          Trainer.advance and Worker.advance in turns, over one base model
    learner's I/O thread the ledger ── MemoryChannel ── actor's I/O thread, reward servers

Weights pass over by reference (`PolicyShelf`): the engine's module tree takes the arrays that the
learner has just published. The worker cannot fail alone: its error ends the process, which the
launcher then starts again as it does any learner.
"""

# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

import itertools
import logging
import platform
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import structs

from actors.bridge_messages import Command, Event, FetchSnapshot, SnapshotFetched
from actors.io import IoThreadHandle
from actors.session import ActorIdentity
from actors.worker import Worker
from launch.processes.workers import new_io, new_worker
from protocol.config.settings import GrpoRun
from protocol.messages.messages import Heartbeat, Policy
from protocol.transport.bridge import Bridge
from protocol.transport.curve_keys import own_client_keys

if TYPE_CHECKING:
    import mlx.nn as nn

    from learner.build.common import Run
    from learner.online.in_process import InProcess
    from protocol.model.policy import LoadedPolicy

log = logging.getLogger("pippin.actor")

NAME = "actor-0"
ACTOR_LOGGERS = ("pippin.actor", "pippin.rewards")


class ColocatedIo:
    """The worker's I/O thread, but for snapshots: policies are in this process already."""

    def __init__(self, io_thread: IoThreadHandle) -> None:
        self._io_thread = io_thread
        self._fetched: list[Event] = []

    def poll(self) -> Iterable[Event]:
        """Return the events that have come, without waiting."""
        fetched, self._fetched = self._fetched, []
        return [*fetched, *self._io_thread.poll()]

    def put(self, command: Command) -> None:
        """Hand over a command; a policy is there at once, and its tensors are on the shelf."""
        if isinstance(command, FetchSnapshot):
            self._fetched.append(SnapshotFetched(command.policy, b""))
        else:
            self._io_thread.put(command)


@contextmanager
def colocated_worker(run: "Run", shared: "InProcess", settings: GrpoRun) -> Generator[Worker]:
    """Join the run with a worker on this thread, and leave it at the end of the block."""
    with _named_in_log(), Bridge[Command, Event](among=shared.bridges) as bridge:
        worker = _new_worker(run, shared, settings, ColocatedIo(IoThreadHandle(bridge)))
        io = new_io(
            lambda: shared.channel.client,
            heartbeat_of(worker),
            endpoint="",
            keys=own_client_keys(settings.transport.keys),
        )
        bridge.start(io.run, "actor-io")
        worker.start()
        log.info("samples in the learner's process, with one copy of the base weights")

        yield worker
        worker.leave("the run is over")


def _new_worker(
    run: "Run", shared: "InProcess", settings: GrpoRun, io_thread: ColocatedIo
) -> Worker:
    from actors.capacity import capacity_of
    from protocol.model.snapshots import load_trainable

    policy = run.policy
    model = engine_model(policy)

    def load(announced: Policy, _: bytes) -> Callable[[], None]:
        arrays = shared.shelf.take(announced.version, announced.digest)
        return lambda: load_trainable(model, arrays, f"policy of version {announced.version}")

    welcome, prefill_step_size = shared.welcome, settings.actors.prefill_step_size
    assert welcome is not None
    capacity = capacity_of(
        settings.actors.max_concurrent_completions,
        welcome,
        policy,
        prefill_step_size=prefill_step_size,
        shares_weights=True,
    )
    identity = ActorIdentity(
        NAME,
        uuid.uuid4().hex,
        platform.node(),
        policy.model_digest,
        policy.tokenizer_digest,
        str(capacity),
    )
    return new_worker(
        policy,
        model,
        identity,
        io_thread,
        load,
        welcome=welcome,
        completions=capacity.completions,
        prefill_step_size=prefill_step_size,
    )


def engine_model(policy: "LoadedPolicy") -> "nn.Module":
    """Return the engine's module tree: its own modules over the arrays of the learner's policy.

    The engine may change its layers; the learner's tree and its mode stay as they are. Where it
    stacks frozen weights, the learner gets the slices, so that they are in memory once.
    """
    from protocol.model.views import second_tree

    return second_tree(policy.model, keep_wrapped=True)


class HasHeartbeat(Protocol):
    """The part of `Worker` that its I/O thread reads."""

    heartbeat: Heartbeat | None


def heartbeat_of(worker: HasHeartbeat) -> Callable[[], Heartbeat | None]:
    """Return the worker's heartbeat, always with new progress.

    A training step may take longer than a lease lasts, and this actor cannot hang without its
    learner: its leases do not expire.
    """
    beats = itertools.count()

    def heartbeat() -> Heartbeat | None:
        latest = worker.heartbeat
        return None if latest is None else structs.replace(latest, progress=next(beats))

    return heartbeat


@contextmanager
def _named_in_log() -> Generator[None]:
    """Begin what the actor's modules log with "actor: ", in the log that it shares."""
    plain = logging.getLogRecordFactory()

    def named(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:  # noqa: ANN401
        record = plain(name, *args, **kwargs)
        if name in ACTOR_LOGGERS or name.startswith("actors."):
            record.msg = f"actor: {record.msg}"
        return record

    logging.setLogRecordFactory(named)
    try:
        yield
    finally:
        logging.setLogRecordFactory(plain)
