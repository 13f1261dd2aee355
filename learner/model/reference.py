"""The frozen reference policy: a second module tree over arrays that the policy holds anyway.

Arrays in MLX are immutable: an update puts new arrays into the policy's tree and leaves those of
the view as they were. So a view of the base costs nothing where adapters are trained, and a view of
everything costs one copy of the weights from the first update on. Nothing is switched to and fro,
so nothing has to be restored and nothing leaks.
"""

import copy
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_flatten

from protocol.config.settings import PolicySettings
from protocol.errors import ModelError
from protocol.model.adapters import load_adapter_folder, read_adapter_config
from protocol.model.digests import folder_digest, model_digest
from protocol.model.policy import LoadedPolicy, load_base, model_folder, seeded
from protocol.model.snapshots import tensors_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A frozen policy in eval mode.

    `digest` is of its source and of its arrays' shapes and dtypes, so a resumed run can check it.
    """

    model: nn.Module
    digest: str
    source: str

    def weights_digest(self) -> str:
        """Digest of every array of the reference; reads all of them."""
        flat = cast(list[tuple[str, mx.array]], tree_flatten(self.model.parameters()))
        return tensors_digest(dict(flat))


def make_reference(policy: LoadedPolicy, settings: PolicySettings) -> Reference:
    """Make the reference that `settings.reference` names: "initial", "base" or a path.

    Call it on a policy fresh from `load_policy`: before any update, and on resume before the
    checkpoint's weights are put in, so that it comes from its source again. Raises ModelError where
    the request cannot be met; there is no falling back to a run without reference. The global
    random state is left as it was.
    """
    with seeded(0):  # loading draws values that it then overwrites
        return _make(policy, settings)


def _make(policy: LoadedPolicy, settings: PolicySettings) -> Reference:
    wanted = settings.reference
    if wanted == "initial":
        return _initial(policy, settings)
    if wanted == "base":
        base = _base_tree(policy, settings)
        return _frozen(base, policy.model_digest, f"base model {settings.path}")
    folder = Path(wanted).expanduser()
    if (folder / "adapter_config.json").is_file():
        return _adapted(policy, settings, folder)
    return _other_model(policy, settings, wanted)


def view(model: nn.Module, *, bypass_adapters: bool) -> nn.Module:
    """Return a second module tree over the same arrays, frozen and in eval mode.

    With `bypass_adapters`, each LoRA or DoRA layer is replaced by the layer that it wraps.
    """
    twin = cast(nn.Module, _twin(model, bypass_adapters, {}))
    twin.freeze()
    twin.eval()
    return twin


def _twin(value: object, bypass: bool, seen: dict[int, object]) -> object:
    if isinstance(value, nn.Module):
        if bypass and "lora_a" in value:
            return _twin(_wrapped(value), bypass, seen)
        if id(value) in seen:
            return seen[id(value)]
        twin = copy.copy(value)
        seen[id(value)] = twin
        # Freezing changes this set in place.
        object.__setattr__(twin, "_no_grad", set(cast(Any, value)._no_grad))
        for key, item in value.items():
            dict.__setitem__(twin, key, _twin(item, bypass, seen))
        return twin
    if isinstance(value, dict):
        return {key: _twin(item, bypass, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_twin(item, bypass, seen) for item in value)
    return value


def _wrapped(adapter: nn.Module) -> nn.Module:
    for key in ("linear", "embedding"):
        if key in adapter:
            return adapter[key]
    raise ModelError(
        f"model.reference: {type(adapter).__module__}.{type(adapter).__name__} wraps no layer that "
        "can be found, so its adapter cannot be bypassed. Give a path in model.reference."
    )


def _initial(policy: LoadedPolicy, settings: PolicySettings) -> Reference:
    fresh_adapters = settings.fine_tune_type != "full" and (
        not settings.adapter_path
        or read_adapter_config(Path(settings.adapter_path)).fine_tune_type == "full"
    )
    digest, source = policy.model_digest, f"model {settings.path}"
    if settings.adapter_path:
        digest = f"{digest}+{policy.adapter_digest}"
        source = f"{source} with adapter {settings.adapter_path}"
    # DoRA multiplies by a quantised weight in floats, the layer that it wraps packed: they differ
    # in the last bits, so there the fresh adapter itself is what the run started from.
    packed = any("scales" in module for module in policy.model.modules())
    bypass = fresh_adapters and not (settings.fine_tune_type == "dora" and packed)
    return _frozen(view(policy.model, bypass_adapters=bypass), digest, source)


def _base_tree(policy: LoadedPolicy, settings: PolicySettings) -> nn.Module:
    """Return the base model, without any adapter that the run started from."""
    loaded = (
        read_adapter_config(Path(settings.adapter_path)).fine_tune_type
        if settings.adapter_path
        else None
    )
    changed = loaded is not None and "full" in (loaded, settings.fine_tune_type)
    if changed:
        log.info("The reference is a second copy of the base model: the adapter changed the first")
        return load_base(settings, policy.folder)[0]
    return view(policy.model, bypass_adapters=True)


def _adapted(policy: LoadedPolicy, settings: PolicySettings, folder: Path) -> Reference:
    base = _base_tree(policy, settings)
    load_adapter_folder(base, folder)
    digest = f"{policy.model_digest}+{folder_digest(folder)}"
    return _frozen(base, digest, f"model {settings.path} with adapter {folder}")


def _other_model(policy: LoadedPolicy, settings: PolicySettings, path: str) -> Reference:
    try:
        folder = model_folder(path)
        # The other model may be stored quantised; its own weights are the reference.
        model, config = load_base(
            msgspec.structs.replace(settings, path=path, quantize_bits=0), folder
        )
    except ModelError as error:
        raise ModelError(
            f'model.reference = "{path}" is not "initial", "base", an adapter folder or a model. '
            f"{error}"
        ) from error
    text = config.get("text_config") or {}
    size = int(config.get("vocab_size") or text.get("vocab_size") or policy.vocab_size)
    if size < policy.vocab_size:
        raise ModelError(
            f'model.reference = "{path}" has {size} tokens, the policy {policy.vocab_size}. A '
            "reference must share the policy's tokenizer."
        )
    digest = model_digest(folder, quantize_bits=0, quantize_group_size=0)
    return _frozen(model, digest, f"model {path}")


def _frozen(model: nn.Module, digest: str, source: str) -> Reference:
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    log.info("Reference policy: %s", source)
    return Reference(model=model, digest=f"{digest}+{_layout(model)}", source=source)


def _layout(model: nn.Module) -> str:
    """Digest of names, shapes and dtypes: of another dtype or quantisation, it is another."""
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    lines = "".join(
        f"{name} {array.shape} {array.dtype}\n"
        for name, array in sorted(flat, key=lambda item: item[0])
    )
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
