"""Builds an actor's parts: for launch/actor.py, and for a learner that samples itself."""

# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import msgspec

from actors.bridge_messages import IoThread
from actors.io import ActorIo
from actors.session import ActorIdentity, Session
from actors.worker import Load, Worker
from protocol.messages.messages import Heartbeat, Welcome
from protocol.messages.parts import RewardService
from protocol.transport.channel import ClientChannel
from protocol.transport.curve_keys import ClientKeys
from protocol.transport.endpoints import reachable

if TYPE_CHECKING:
    import mlx.nn as nn

    from actors.engine.mlx_engine import MlxEngine
    from actors.rewards.client import RewardClient
    from protocol.model.policy import LoadedPolicy


def new_io(
    connect: Callable[[], AbstractAsyncContextManager[ClientChannel]],
    heartbeat: Callable[[], Heartbeat | None],
    *,
    endpoint: str,
    keys: ClientKeys | None,
) -> ActorIo:
    """Return the program of an actor's I/O thread; `endpoint` is the learner's, "" in-process."""

    def make_scorer(services: list[RewardService]) -> "RewardClient":
        from actors.rewards.client import RewardClient

        reached = [
            msgspec.structs.replace(s, endpoints=[reachable(e, endpoint) for e in s.endpoints])
            for s in services
        ]
        return RewardClient(reached, keys=keys)

    return ActorIo(
        connect=connect,
        make_scorer=make_scorer,
        heartbeat=heartbeat,
        keys=keys,
        endpoint=endpoint,
    )


def new_engine(
    policy: "LoadedPolicy",
    model: "nn.Module",
    *,
    completions: int,
    prefill_step_size: int,
    max_tokens: int,
    deterministic: bool,
) -> "MlxEngine":
    """Return an engine that samples with `model`, which belongs to it from now on.

    `completions` are sampled at a time; `max_tokens` are those of the longest prompt and completion
    together.
    """
    from actors.engine.mlx_engine import MlxEngine

    return MlxEngine(
        model,
        stop_token_ids=policy.stop_token_ids,
        vocab_size=policy.vocab_size,
        max_concurrent_completions=completions,
        prefill_step_size=prefill_step_size,
        context_length=policy.config.get("max_position_embeddings"),
        max_tokens=max_tokens,
        deterministic=deterministic,
    )


def new_worker(
    policy: "LoadedPolicy",
    model: "nn.Module",
    identity: ActorIdentity,
    io_thread: IoThread,
    load: Load,
    *,
    welcome: Welcome,
    completions: int,
    prefill_step_size: int,
) -> Worker:
    """Return a worker that samples with `model`, which belongs to its engine from now on.

    `load` is the worker's; the rest of `policy` says how to read and write tokens. `completions`
    are sampled at a time.
    """
    from protocol.model.device_memory import memory_use

    engine = new_engine(
        policy,
        model,
        completions=completions,
        prefill_step_size=prefill_step_size,
        max_tokens=welcome.max_tokens,
        deterministic=welcome.deterministic,
    )

    def decode(token_ids: list[int]) -> str:
        return policy.tokenizer.decode(token_ids, skip_special_tokens=True)

    return Worker(engine, Session(identity), io_thread, decode=decode, load=load, memory=memory_use)
