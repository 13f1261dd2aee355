"""The head of a model apart from its trunk.

`split_head` makes head and trunk out of any mlx-lm model without knowing its kind: the head is the
model's own `__call__` with the trunk replaced by a stand-in that hands on given hidden states, so
tied and quantised embeddings, logit scales and soft caps are the model's.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from protocol.errors import ModelError

_TRUNKS = ("model", "transformer", "backbone", "gpt_neox")


class _Hidden(nn.Module):
    """Stands in for the trunk: returns its input, and the trunk's attributes as its own.

    `read` collects the names of those that were asked for.
    """

    def __init__(self, trunk: nn.Module) -> None:
        self["_trunk"] = trunk  # first: nn.Module looks names up while it sets itself up
        super().__init__()
        self.read: set[str] = set()

    def __call__(self, hidden: mx.array, *_: object, **__: object) -> mx.array:
        return hidden

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        value = getattr(self["_trunk"], name)
        self.read.add(name)
        return value


@dataclass(frozen=True)
class SplitModel:
    """`trunk`: (B, T) token IDs to (B, T, D) hidden states; `head`: those to (B, T, V) logits.

    In `head`, `stand_in` takes the trunk's place; `own` are the head's other modules.
    """

    trunk: nn.Module
    head: nn.Module
    stand_in: _Hidden
    own: dict[str, Any]

    def states(self, input_ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Run the trunk, with a cache for each layer where one is given."""
        asked = inspect.signature(type(self.trunk).__call__).parameters.get("cache")
        required = asked is not None and asked.default is inspect.Parameter.empty
        if required or cache is not None:
            return self.trunk(input_ids, cache=cache)
        return self.trunk(input_ids)

    def owner(self, hidden: mx.array) -> nn.Module:
        """Return a module of all whose arrays the head may read: its own and, of the trunk, what
        it asks for when it sees `hidden` (N, D): an embedding, where they are tied.

        A model may have a head's weights and yet not read them.
        """
        self.stand_in.read.clear()
        logits_of(self.head, hidden[:1])  # builds a graph that nobody evaluates
        owner, shared = nn.Module(), nn.Module()
        dict.update(owner, self.own)
        read = {name: self.trunk[name] for name in self.stand_in.read if name in self.trunk}
        dict.update(shared, {name: part for name, part in read.items() if _has_arrays(part)})
        owner["trunk"] = shared
        return owner


def split_head(model: nn.Module) -> SplitModel:
    """Split an mlx-lm model into trunk and head; its modules and arrays are shared, not copied.

    Raises ModelError where the model is not built as a trunk with a head.
    """
    inner = model
    while not any(name in inner for name in _TRUNKS) and "language_model" in inner:
        inner = inner["language_model"]
    name = next((name for name in _TRUNKS if name in inner), None)
    if name is None:
        raise ModelError(
            f"{type(model).__module__} has none of {', '.join(_TRUNKS)}, so its head cannot be "
            'told from its trunk. Set train.head = "full".'
        )
    trunk = inner[name]
    head = copy.copy(inner)
    head[name] = stand_in = _Hidden(trunk)
    own = {key: value for key, value in inner.items() if key != name and _has_arrays(value)}
    return SplitModel(trunk=trunk, head=head, stand_in=stand_in, own=own)


def logits_of(head: nn.Module, hidden: mx.array) -> mx.array:
    """(n, D) to (n, V): the model's own head sees a batch of one row."""
    return head(hidden[None]).squeeze(0)


def _has_arrays(value: object) -> bool:
    return bool(tree_flatten(value)) if isinstance(value, mx.array | nn.Module | list) else False
