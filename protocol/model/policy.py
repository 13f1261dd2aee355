"""Loads the policy: model and tokenizer, which tensors are trained, and digests of each.

Learner and actors load the same `ModelSettings` with it, so that both have the same trainable
tensors under the same names; `protocol/model/snapshots.py` moves these between them.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import mlx.nn as nn

from protocol.config.settings import ModelSettings
from protocol.errors import ModelError
from protocol.model.adapters import AdapterConfig, attach_adapters
from protocol.model.base_model import load_base, load_tokenizer, model_folder
from protocol.model.device_memory import limit_buffer_cache
from protocol.model.digests import folder_digest, model_digest, tokenizer_digest
from protocol.model.random_state import seeded
from protocol.model.snapshots import named_arrays, trainable

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy ready to sample from or to train, in eval mode."""

    model: nn.Module  # an mlx-lm model
    tokenizer: "TokenizerWrapper"
    config: dict[str, Any]  # the model's config.json
    folder: Path  # of the model
    model_digest: str
    tokenizer_digest: str
    adapter_digest: str  # of `adapter_path`; empty without it
    stop_token_ids: tuple[int, ...]
    vocab_size: int  # token IDs are valid in [0, vocab_size)
    adapter_config: AdapterConfig


def load_policy(settings: ModelSettings, *, seed: int) -> LoadedPolicy:
    """Load the policy that `settings` describe; the same `seed` gives the same adapters.

    Raises ModelError if it cannot be loaded. The global random state is left as it was; MLX's
    buffer cache is bounded from now on, in every process that has a policy.
    """
    limit_buffer_cache()
    folder = model_folder(settings.path, settings.revision)
    with seeded(seed):
        model, config = load_base(settings, folder)
    tokenizer = load_tokenizer(settings, folder, config)

    with seeded(seed):
        adapter_config = attach_adapters(model, settings)
        mx.eval(model.parameters())
    if not trainable(model):
        raise ModelError(
            "model.lora.keys names no layer of this model, so nothing would be trained. Leave it "
            "out to adapt every linear layer, or name layers such as self_attn.q_proj."
        )
    model.eval()
    _log_trainable(model, adapter_config)

    stop_token_ids = tuple(sorted(int(token) for token in tokenizer.eos_token_ids))
    return LoadedPolicy(
        model=model,
        tokenizer=tokenizer,
        config=config,
        folder=folder,
        model_digest=model_digest(
            folder,
            quantize_bits=settings.quantize_bits,
            quantize_group_size=settings.quantize_group_size,
        ),
        tokenizer_digest=tokenizer_digest(
            folder,
            chat_template=tokenizer.chat_template,
            stop_token_ids=stop_token_ids,
        ),
        adapter_digest=folder_digest(Path(settings.adapter_path)) if settings.adapter_path else "",
        stop_token_ids=stop_token_ids,
        vocab_size=_vocab_size(config, tokenizer),
        adapter_config=adapter_config,
    )


def _vocab_size(config: dict[str, Any], tokenizer: "TokenizerWrapper") -> int:
    text: dict[str, Any] = config.get("text_config") or {}
    size = config.get("vocab_size") or text.get("vocab_size")
    return int(size) if size else len(cast(Any, tokenizer))


def _log_trainable(model: nn.Module, adapter_config: AdapterConfig) -> None:
    arrays = trainable(model)
    total = sum(array.size for array in named_arrays(model.parameters()).values())

    log.info(
        "Training %s: %d tensors, %s parameters (of %s stored)",
        adapter_config.fine_tune_type,
        len(arrays),
        f"{sum(array.size for array in arrays.values()):,}",
        f"{total:,}",
    )
