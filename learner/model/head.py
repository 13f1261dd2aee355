"""Splits a model into trunk and head.

`split_head` does this for any mlx-lm model without knowing its kind: the head is the model's own
`__call__` with the trunk replaced by a stand-in that passes given hidden states through. So tied
and quantised embeddings, logit scales and soft caps are the model's own.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

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
    """Stands in for the trunk: returns its input, and offers the trunk's attributes as its own.

    `read` collects the names of the attributes that were read.
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
    """A model's trunk and head; both share modules and arrays with the model."""

    trunk: nn.Module  # (B, T) token IDs to (B, T, D) hidden states
    head: nn.Module  # (B, T, D) hidden states to (B, T, V) logits
    stand_in: _Hidden  # takes the trunk's place in `head`
    own: dict[str, Any]  # the head's other modules and arrays, by name

    def states(self, input_ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Run the trunk, with one cache per layer if they are given."""
        # Some trunks take no cache, others cannot do without the argument.
        asked = inspect.signature(type(self.trunk).__call__).parameters.get("cache")
        required = asked is not None and asked.default is inspect.Parameter.empty
        if required or cache is not None:
            return self.trunk(input_ids, cache=cache)
        return self.trunk(input_ids)

    def owner(self, hidden: mx.array) -> nn.Module:
        """Return a module that owns every array the head may read.

        These are the head's own modules and those of the trunk that it reads when called on
        `hidden` (N, D): the embedding, if it is tied. A model may have an untied head's weights
        and still not read them, so only a call can tell.
        """
        self.stand_in.read.clear()
        logits_of(self.head, hidden[:1])  # builds a graph that is never evaluated

        # `dict.update`, because nn.Module's own `update` would look for existing parameters.
        owner, shared = nn.Module(), nn.Module()
        dict.update(owner, self.own)
        read = {name: self.trunk[name] for name in self.stand_in.read if name in self.trunk}
        dict.update(shared, {name: part for name, part in read.items() if _has_arrays(part)})
        owner["trunk"] = shared
        return owner


def split_head(model: nn.Module) -> SplitModel:
    """Split an mlx-lm model into trunk and head; its modules and arrays are shared, not copied.

    Raises ModelError if the model is not built as a trunk with a head.
    """
    # Multimodal releases keep the text model, with its trunk and head, in `language_model`.
    inner = model
    while not any(name in inner for name in _TRUNKS) and "language_model" in inner:
        inner = inner["language_model"]
    name = next((name for name in _TRUNKS if name in inner), None)
    if name is None:
        raise ModelError(
            f"{type(model).__module__} has none of {', '.join(_TRUNKS)}, so its trunk and head "
            'cannot be separated. Set train.head = "full".'
        )

    trunk = inner[name]
    head = copy.copy(inner)  # shallow: only its trunk is replaced
    head[name] = stand_in = _Hidden(trunk)
    own = {key: value for key, value in inner.items() if key != name and _has_arrays(value)}
    return SplitModel(trunk=trunk, head=head, stand_in=stand_in, own=own)


def logits_of(head: nn.Module, hidden: mx.array) -> mx.array:
    """Return logits (n, V) of hidden states (n, D), which the head sees as one sequence."""
    return head(hidden[None]).squeeze(0)


def _has_arrays(value: object) -> bool:
    return bool(tree_flatten(value)) if isinstance(value, mx.array | nn.Module | list) else False
