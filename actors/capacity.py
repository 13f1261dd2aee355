"""How many completions an actor samples at once, and the memory that they take.

    peak = weights + slots + one layer of slots + the larger of prefill and sampling

An estimate, made before anything is sampled: within 25% of what tests/benchmarks/actor_memory.py
measures. With "auto", an actor takes its share of what the queue can hold in flight, or less where
the memory, which it shares with the learner and the other actors of a machine, is not enough.
"""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import logging
import platform
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from actors.engine.decoding.shapes import PREFILL_TOKENS, shapes_for
from actors.engine.sizes import bytes_per_position
from protocol.errors import ModelError
from protocol.messages.messages import Welcome
from protocol.model.device_memory import device_memory, visible_device
from protocol.model.dimensions import LayerShape, compute_itemsize, weight_bytes
from protocol.model.policy import LoadedPolicy

log = logging.getLogger("pippin.actor")

USABLE = 0.8  # of the device's memory: the rest is for MLX's caches, other programs and error
# Arrays of (completions, V) float32 that exist at once while tokens are drawn.
_SAMPLING_ARRAYS = 3
# Arrays that one layer holds at once while a prompt is read, in units of the hidden size and of
# the MLP's size per token.
_HIDDEN_ARRAYS = 3
_MLP_ARRAYS = 3


@dataclass(frozen=True, kw_only=True)
class ActorMemory:
    """Bytes that an actor takes, by purpose."""

    weights: int
    slot: int  # per completion: keys and values of its prompt and tokens
    slot_layer: int  # per completion: those of one layer, which are copied now and then
    sampling: int  # per completion: arrays over the vocabulary
    position: int  # per prompt token: keys and values as read, and as copied into slots
    token: int  # per prompt token: what one layer holds while it is read
    max_prompt: int  # tokens
    chunk: int  # prompt tokens that are read in one pass, at most
    num_generations: int

    def total(self, completions: int) -> int:
        """Return the peak with this many completions at a time."""
        prompts = -(-completions // self.num_generations) * self.max_prompt
        together = min(prompts, max(self.max_prompt, PREFILL_TOKENS))
        prefill = together * self.position + min(together, self.chunk) * self.token
        slots = completions * (self.slot + self.slot_layer)
        return self.weights + slots + max(prefill, completions * self.sampling)

    def most_within(self, budget: int, wanted: int) -> int:
        """Return the most completions, up to `wanted`, whose peak is within `budget` bytes."""
        return bisect_right(range(1, wanted + 1), budget, key=self.total)


def estimate_memory(
    model: nn.Module,
    config: Mapping[str, Any],
    *,
    max_prompt: int,
    max_tokens: int,
    num_generations: int,
    prefill_step_size: int,
    deterministic: bool = False,
) -> ActorMemory:
    """Estimate an actor's memory from its model and the model's config.json.

    `max_prompt` are the tokens of the longest prompt, `max_tokens` those of the longest prompt and
    completion together, `prefill_step_size` those of prompts that go through the model at once.
    """
    shape, itemsize = LayerShape.of(config), compute_itemsize(model)
    position = bytes_per_position(model)
    columns = shapes_for(mx.default_device(), deterministic=deterministic).capacity(max_tokens)
    slot = columns * position
    token = (_HIDDEN_ARRAYS * shape.hidden + _MLP_ARRAYS * shape.mlp) * itemsize
    if mx.default_device().type == mx.DeviceType.cpu:  # where attention is not fused
        token += shape.heads * max_prompt * 4
    return ActorMemory(
        weights=weight_bytes(model),
        slot=slot,
        slot_layer=slot // max(1, shape.layers),
        sampling=_SAMPLING_ARRAYS * shape.vocabulary * 4,
        position=2 * position,
        token=token,
        max_prompt=max_prompt,
        chunk=prefill_step_size,
        num_generations=num_generations,
    )


def memory_budget(welcome: Welcome, *, host: str, device: str, memory: int) -> int:
    """Return the bytes that an actor may take of its device's `memory`.

    On the learner's `host`, the local actors share what the learner leaves; `device` tells whether
    it computes on the same one.
    """
    usable = int(USABLE * memory)
    if host != welcome.host:
        return usable
    if device == welcome.device:
        usable -= welcome.learner_bytes
    return max(0, usable // max(1, welcome.local_actors))


@dataclass(frozen=True)
class Capacity:
    """How many completions an actor samples at a time, the peak in bytes, and why, in words.

    `fits` is False where the peak is more than the actor may take.
    """

    completions: int
    peak_bytes: int
    reason: str
    fits: bool

    def __str__(self) -> str:
        size = f"{self.peak_bytes / 1e9:.2f} GB"
        return f"{self.completions} completions at a time, estimated at {size}: {self.reason}"


def choose_capacity(
    asked: int | Literal["auto"], welcome: Welcome, memory: ActorMemory, budget: int
) -> Capacity:
    """Return how many completions to sample at a time, at least 1; a number asked for stays.

    Raises ModelError if a deterministic run's number does not fit.
    """
    allowed = f"{budget / 1e9:.2f} GB for it"
    if asked != "auto":
        most = memory.most_within(budget, asked)
        fits = most == asked
        reason = "as asked" if fits else f"as asked, but there is {allowed}, enough for {most}"
        return Capacity(asked, memory.total(asked), reason, fits)

    actors, in_flight = max(1, welcome.local_actors), welcome.in_flight_completions
    if welcome.deterministic:
        actors = 1  # one shape for all of them, whatever their number
    wanted = max(1, -(-in_flight // actors))
    over = f" over {actors} actors" if actors > 1 else ""
    reason = f"the queue holds at most {in_flight} in flight{over}"

    most = memory.most_within(budget, wanted)
    if most < wanted and welcome.deterministic:
        raise ModelError(
            f"run.deterministic: all actors sample {wanted} completions at a time, which is the "
            f"most that the queue holds, and there is {allowed}, enough for {most}. Set the same "
            "actors.max_concurrent_completions for all, or run.deterministic = false"
        )
    if most < wanted:
        reason = f"bounded by memory, as there is {allowed}; {wanted} would use the whole queue"
    chosen = max(1, most)
    return Capacity(chosen, memory.total(chosen), reason, most > 0)


def capacity_of(
    asked: int | Literal["auto"],
    welcome: Welcome,
    policy: LoadedPolicy,
    *,
    prefill_step_size: int,
    shares_weights: bool = False,
) -> Capacity:
    """Choose and log how many completions this process samples at a time.

    `shares_weights`: the learner, in the same process, counts the weights. More than the memory
    holds is warned about.
    """
    memory = estimate_memory(
        policy.model,
        policy.config,
        max_prompt=welcome.max_prompt,
        max_tokens=welcome.max_tokens,
        num_generations=welcome.min_generations,
        prefill_step_size=prefill_step_size,
        deterministic=welcome.deterministic,
    )
    if shares_weights:
        memory = replace(memory, weights=0)

    budget = memory_budget(
        welcome, host=platform.node(), device=visible_device(), memory=device_memory()
    )
    chosen = choose_capacity(asked, welcome, memory, budget)
    log.log(logging.INFO if chosen.fits else logging.WARNING, "%s", chosen)
    return chosen
