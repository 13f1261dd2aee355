"""An actor: `launch/actor.py --connect ENDPOINT [--keys DIR] [--model PATH] [--name ID]`.

It samples completions of the prompts that the learner leases to it and has them scored, on any
machine; it needs no dataset, and may join or leave a running job at any time. Exit status 0: the
run is over, or the actor was asked to leave; 1: it failed.
"""

import argparse
import logging
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from actors.bridge_messages import Command, Event, MessageReceived, Send
from actors.io import IoThreadHandle
from actors.session import ActorIdentity
from actors.worker import Worker
from launch.processes.early_load import EarlyPolicy, load_early
from launch.processes.stages import Stages
from launch.processes.start import Lifeline, start_process
from launch.processes.workers import new_io, new_worker
from protocol.config.settings import ModelSettings
from protocol.errors import PippinError, RefusedError, SnapshotError
from protocol.messages.messages import PROTOCOL_VERSION, Hello, Policy, Refuse, Welcome
from protocol.run_record import record_event
from protocol.transport.bridge import Bridge
from protocol.transport.channel import Client
from protocol.transport.curve_keys import (
    ClientKeys,
    actor_name,
    load_client_keys,
    own_client_keys,
)

if TYPE_CHECKING:
    from protocol.model.policy import LoadedPolicy

log = logging.getLogger("pippin.actor")

IDLE_S = 0.2
ASK_AGAIN_S = 2.0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connect", required=True, metavar="ENDPOINT", help="of the learner")
    parser.add_argument(
        "--keys", default=None, metavar="DIR", help="with this actor's key pair (launch/keys.py)"
    )
    parser.add_argument("--model", default="", metavar="PATH", help="of the model on this machine")
    parser.add_argument(
        "--max-concurrent-completions",
        type=completions,
        default="auto",
        metavar="N",
        help="sampled at once; auto (default): as many as the queue and the memory allow",
    )
    parser.add_argument(
        "--prefill-step-size", type=int, default=2048, metavar="N", help="prompt tokens per pass"
    )
    parser.add_argument(
        "--name", default="", metavar="ID", help="unique among the run's actors; its key's, if any"
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="of the run, for an actor beside its learner"
    )
    parser.add_argument("--child", action="store_true", help="end when standard input closes")
    args = parser.parse_args()
    if args.prefill_step_size < 1:
        parser.error("--prefill-step-size must be at least 1")
    return args


def completions(text: str) -> int | Literal["auto"]:
    """Read a number of completions; raises ArgumentTypeError unless it is auto or at least 1."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"required auto or a number of at least 1, got {text!r}")
    return int(text)


def main() -> int:
    """Join, work until the learner says Stop or we are asked to leave, then leave."""
    args = arguments()
    lifeline = start_process(child=args.child, mlx=True)
    slot: list[Worker] = []  # empty until the learner has said which model it trains

    # MLX stays on this main thread; the I/O thread serves the sockets.
    try:
        args.name, keys = identify(args)
        with Bridge[Command, Event]() as bridge:
            io = new_io(
                lambda: Client(args.connect, keys=keys),
                lambda: slot[0].heartbeat if slot else None,
                endpoint=args.connect,
                keys=keys,
            )
            bridge.start(io.run, "actor-io")
            _work(args, IoThreadHandle(bridge), lifeline, slot)
    except PippinError as error:
        log.error("%s: %s", type(error).__name__, error)
        return 1
    except KeyboardInterrupt:
        log.info("interrupted")
    return 0


def identify(args: argparse.Namespace) -> tuple[str, ClientKeys | None]:
    """Return the actor's name and its keys: through tcp with keys, the name is that of its key.

    A local socket asks for no key; the folder is then for reward servers on other machines.
    """
    if args.keys and args.connect.startswith("tcp://"):
        name = actor_name(args.keys, args.name)
        return name, load_client_keys(args.keys, name)
    name = args.name or f"{platform.node() or 'actor'}-{os.getpid()}"
    return name, own_client_keys(args.keys)


def _work(
    args: argparse.Namespace, io_thread: IoThreadHandle, lifeline: Lifeline, slot: list[Worker]
) -> None:
    """Load the model that the learner names, then advance the worker until the run is over."""
    name = args.name
    stages = Stages(name)
    early = load_early(args.run_dir, stages)
    incarnation = uuid.uuid4().hex
    welcome = enquire(io_thread, name, incarnation, args.connect, lifeline)
    stages.done("welcome")
    if welcome is None:
        return

    from actors.capacity import capacity_of

    policy = _policy(args, welcome, early)
    early = None  # not to keep a model that does not fit
    capacity = capacity_of(
        args.max_concurrent_completions, welcome, policy, prefill_step_size=args.prefill_step_size
    )
    stages.done("model")
    identity = ActorIdentity(
        name,
        incarnation,
        platform.node(),
        policy.model_digest,
        policy.tokenizer_digest,
        str(capacity),
    )

    worker = _worker(args, welcome, capacity.completions, policy, identity, io_thread)
    stages.done("engine")
    slot.append(worker)  # the I/O thread sends its heartbeats from now on
    worker.start()

    log.info("actor %s joins run %s at %s", name, welcome.run, args.connect)
    started = False
    try:
        while worker.stopped is None and not lifeline.stop_requested:
            if not worker.advance():
                io_thread.wait(IDLE_S)
            if not started and worker.heartbeat is not None and worker.heartbeat.tokens_sampled:
                started = True
                stages.done("first tokens")
                _report_start(args, stages)
    except KeyboardInterrupt:
        log.info("interrupted: leaving")

    reason = worker.stopped or "asked to leave"
    log.info("actor %s leaves: %s", name, reason)
    worker.leave(reason)


def _policy(
    args: argparse.Namespace, welcome: Welcome, early: EarlyPolicy | None
) -> "LoadedPolicy":
    """Return the policy that the learner trains: the one loaded early, if it is the same."""
    from protocol.model.policy import load_policy

    settings = msgspec.convert(welcome.model, ModelSettings)
    if args.model:
        settings = msgspec.structs.replace(settings, path=args.model)
    if early is not None and (early.settings, early.seed) == (settings, welcome.seed):
        return early.policy
    return load_policy(settings, seed=welcome.seed)


def _report_start(args: argparse.Namespace, stages: Stages) -> None:
    """Say how long it took to the first tokens: in the run's events, if its folder is here."""
    if args.run_dir is not None:
        record_event(args.run_dir, stages.event())
    else:
        log.info("%s", stages.event().text)


def enquire(
    io_thread: IoThreadHandle, name: str, incarnation: str, endpoint: str, lifeline: Lifeline
) -> Welcome | None:
    """Ask the learner for its terms until it answers; None if we are asked to leave first.

    Raises RefusedError if the learner refuses this actor.
    """
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        actor_id=name,
        actor_incarnation=incarnation,
        host=platform.node(),
    )
    # The learner may start later, or be restarting: no answer is not an error.
    asked = 0
    ask_at = time.monotonic()
    while not lifeline.stop_requested:
        if time.monotonic() >= ask_at:
            if asked == 1:
                log.info("no answer yet from %s; still asking", endpoint)
            io_thread.put(Send(hello))
            asked, ask_at = asked + 1, time.monotonic() + ASK_AGAIN_S

        io_thread.wait(IDLE_S)
        for event in io_thread.poll():
            message = event.message if isinstance(event, MessageReceived) else None
            if isinstance(message, Welcome):
                return message
            if isinstance(message, Refuse) and message.fatal:
                raise RefusedError(
                    f"{endpoint} refused actor {name} ({message.code}): {message.reason}"
                )
    return None


def _worker(
    args: argparse.Namespace,
    welcome: Welcome,
    completions: int,
    policy: "LoadedPolicy",
    identity: ActorIdentity,
    io_thread: IoThreadHandle,
) -> Worker:
    from protocol.model.snapshots import apply_snapshot, read_snapshot

    def load(announced: Policy, data: bytes) -> Callable[[], None]:
        snapshot = read_snapshot(data)
        if snapshot.digest != announced.digest:
            raise SnapshotError(
                f"the learner announced a snapshot with digest {announced.digest[:12]}, received "
                f"one with {snapshot.digest[:12]}; is another run writing to the same folder?"
            )
        return lambda: apply_snapshot(policy.model, snapshot)

    return new_worker(
        policy,
        policy.model,
        identity,
        io_thread,
        load,
        welcome=welcome,
        completions=completions,
        prefill_step_size=args.prefill_step_size,
    )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A daemon thread may still be reading standard input, which a normal exit would wait for.
    os._exit(status)
