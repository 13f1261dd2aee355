"""The frozen reference policy: a second module tree over arrays that the policy holds anyway.

A view of the base costs nothing when adapters are trained, and a view of everything costs one copy
of the weights from the first update on (`protocol/model/views.py`).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import msgspec

from protocol.config.settings import PolicySettings
from protocol.errors import ModelError
from protocol.model.adapters import load_adapter_folder
from protocol.model.base_model import load_base, model_folder
from protocol.model.digests import folder_digest, model_digest
from protocol.model.policy import LoadedPolicy
from protocol.model.random_state import seeded
from protocol.model.snapshots import named_arrays
from protocol.model.views import second_tree

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A frozen policy in eval mode."""

    model: nn.Module
    digest: str  # of its source and its arrays' shapes and dtypes; a resumed run checks it


def make_reference(policy: LoadedPolicy, settings: PolicySettings) -> Reference:
    """Make the reference that `settings.reference` names: "initial", "base" or a path.

    Call it on a policy fresh from `load_policy`: before any update, and on resume before the
    checkpoint's weights are loaded, so that it is rebuilt from its source. Raises ModelError if it
    cannot be made. The global random state is left as it was.
    """
    wanted = settings.reference
    with seeded(0):  # loading draws random values and then overwrites them
        if wanted == "initial":
            return _initial(policy, settings)

        folder = Path(wanted).expanduser()
        adapted = (folder / "adapter_config.json").is_file()
        if wanted != "base" and not adapted:
            return _other_model(policy, settings, wanted)

        base = view(policy.model, bypass_adapters=True, keep_wrapped=wanted == "base")
        if wanted == "base":
            return _frozen(base, policy.model_digest, f"base model {settings.path}")

        # The adapter may be LoRA, DoRA or full weights, whatever kind the policy trains: the view
        # of the base gets arrays and layers that the policy does not see.
        load_adapter_folder(base, folder)
        digest = f"{policy.model_digest}+{folder_digest(folder)}"
        return _frozen(base, digest, f"model {settings.path} with adapter {folder}")


def view(model: nn.Module, *, bypass_adapters: bool, keep_wrapped: bool = False) -> nn.Module:
    """Return a second module tree over the same arrays, frozen and in eval mode.

    For the options see `second_tree`; `keep_wrapped` is for a view that gets no weights of its own.
    """
    tree = second_tree(model, bypass_adapters=bypass_adapters, keep_wrapped=keep_wrapped)
    tree.freeze()
    tree.eval()
    return tree


def _initial(policy: LoadedPolicy, settings: PolicySettings) -> Reference:
    digest, source = policy.model_digest, f"model {settings.path}"
    if settings.adapter_path:
        digest = f"{digest}+{policy.adapter_digest}"
        source = f"{source} with adapter {settings.adapter_path}"

    # New adapters change nothing yet, so the layers that they wrap are the same policy for less
    # work. But DoRA multiplies by a quantised weight in floats and the wrapped layer by the packed
    # one, so they differ in the last bits: there the run starts from the new adapter itself.
    new_adapters = settings.fine_tune_type != "full" and not settings.adapter_path
    packed = any("scales" in module for module in policy.model.modules())
    bypass = new_adapters and not (settings.fine_tune_type == "dora" and packed)
    tree = view(policy.model, bypass_adapters=bypass, keep_wrapped=True)
    return _frozen(tree, digest, source)


def _other_model(policy: LoadedPolicy, settings: PolicySettings, path: str) -> Reference:
    try:
        folder = model_folder(path)
        # The other model may be stored quantised, so it is taken as it is.
        other = msgspec.structs.replace(settings, path=path, quantize_bits=0)
        model, config = load_base(other, folder)
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
    return Reference(model=model, digest=f"{digest}+{_layout(model)}")


def _layout(model: nn.Module) -> str:
    """Digest names, shapes and dtypes; another dtype or quantisation is another reference."""
    arrays = sorted(named_arrays(model.parameters()).items())
    lines = "".join(f"{name} {array.shape} {array.dtype}\n" for name, array in arrays)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
