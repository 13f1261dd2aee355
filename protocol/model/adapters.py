"""Which tensors are trained: LoRA or DoRA adapters in mlx-lm's layers and files, or all of them."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from protocol.config.settings import ModelSettings
from protocol.errors import ModelError
from protocol.model.snapshots import trainable, write_tensors

log = logging.getLogger(__name__)

FineTuneType = Literal["lora", "dora", "full"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """adapter_config.json; `lora_parameters` are rank, scale, dropout and, if given, keys."""

    fine_tune_type: FineTuneType
    num_layers: int
    lora_parameters: dict[str, Any]


def adapter_config(settings: ModelSettings) -> AdapterConfig:
    """Return the configuration of new adapters."""
    lora = settings.lora
    parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout}
    # mlx-lm reads a missing key as "every linear layer"; None would be an error there.
    if lora.keys is not None:
        parameters["keys"] = list(lora.keys)

    return AdapterConfig(
        fine_tune_type=settings.fine_tune_type,
        num_layers=lora.num_layers,
        lora_parameters=parameters,
    )


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json of an adapter folder in mlx-lm's format.

    Raises ModelError if it is missing or cannot be understood.
    """
    try:
        raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = raw.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora", "full"):
            raise ValueError(f"unknown fine_tune_type {kind!r}")

        return AdapterConfig(
            fine_tune_type=kind,
            num_layers=int(raw.get("num_layers", -1)),
            lora_parameters=dict(raw.get("lora_parameters") or {}),
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            f"model.adapter_path: {folder} is not an adapter folder in mlx-lm's format ({error}). "
            "It must hold adapter_config.json and adapters.safetensors."
        ) from error


def attach_adapters(model: nn.Module, settings: ModelSettings) -> AdapterConfig:
    """Freeze `model` except what `settings` train, starting from `adapter_path` if it is given.

    A loaded adapter's own rank, scale and layers override `settings.lora`. Raises ModelError for
    an adapter of another kind than `fine_tune_type`, and for one that holds full weights: a run
    that starts from full weights names them as its model.
    """
    wanted = adapter_config(settings)
    model.freeze()
    if not settings.adapter_path:
        _make_trainable(model, wanted)
        return wanted

    folder = Path(settings.adapter_path)
    loaded = read_adapter_config(folder)
    kind = loaded.fine_tune_type
    if kind == "full" or kind != wanted.fine_tune_type:
        switch = "" if kind == "full" else f'Set model.fine_tune_type = "{kind}". Or: '
        raise ModelError(
            f"model.adapter_path: {folder} holds a {kind} adapter, but model.fine_tune_type is "
            f"{wanted.fine_tune_type!r}. {switch}Fuse the adapter with mlx_lm.fuse first and give "
            "the result as model.path."
        )

    _load(model, folder)
    if loaded.lora_parameters != wanted.lora_parameters:
        log.info("Using the adapter settings stored in %s: %s", folder, loaded.lora_parameters)
    return loaded


def load_adapter_folder(model: nn.Module, folder: Path) -> None:
    """Freeze `model` and put the adapter of `folder`, of any kind, on it."""
    read_adapter_config(folder)  # refuses what is not an adapter folder
    model.freeze()
    _load(model, folder)


def save_adapters(folder: str | Path, model: nn.Module, config: AdapterConfig, base: str) -> None:
    """Write the trainable tensors as an adapter folder that `mlx_lm.generate` can load.

    `base` is the model's path or hub id, noted in the file. Raises SnapshotError on a full disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    write_tensors(folder / "adapters.safetensors", trainable(model), {"format": "mlx"})
    raw = {
        "fine_tune_type": config.fine_tune_type,
        "lora_parameters": config.lora_parameters,
        "model": base,
        "num_layers": config.num_layers,
    }

    (folder / "adapter_config.json").write_text(json.dumps(raw, indent=4) + "\n", encoding="utf-8")


def _make_trainable(model: nn.Module, config: AdapterConfig) -> None:
    if config.fine_tune_type == "full":
        _unfreeze(model)
        return

    from mlx_lm.tuner.utils import linear_to_lora_layers

    try:
        linear_to_lora_layers(
            model,
            config.num_layers,
            config.lora_parameters,
            use_dora=config.fine_tune_type == "dora",
        )
    except (KeyError, ValueError, AttributeError) as error:
        raise ModelError(
            f"model.fine_tune_type = {config.fine_tune_type!r} does not fit this model: {error}. "
            'Choose the layers with model.lora.keys, or set model.fine_tune_type = "lora".'
        ) from error

    _match_dtypes(model)


def _unfreeze(model: nn.Module) -> None:
    """Make every floating-point tensor trainable.

    The packed integers of quantised layers have no gradient. Their scales and biases do (MLX's
    quantized_matmul differentiates them), so these are trained along with the norms.
    """
    model.unfreeze()
    packed = 0
    for module in model.modules():
        if "scales" not in module:
            continue
        packed += 1
        keys = [
            key
            for key, value in module.items()
            if key != "weight"
            and isinstance(value, mx.array)
            and mx.issubdtype(value.dtype, mx.floating)
        ]
        # QuantizedLinear overrides unfreeze to stay frozen, QuantizedEmbedding does not.
        nn.Module.freeze(module, recurse=False)
        nn.Module.unfreeze(module, recurse=False, keys=keys)

    if packed:
        log.warning(
            "Full fine-tuning of quantised weights trains only scales, biases and norms; the "
            "packed integers of %d layers stay as they are. Use an unquantised model to train "
            "everything.",
            packed,
        )


def _load(model: nn.Module, folder: Path) -> None:
    """Put the adapter of `folder` on `model`: LoRA or DoRA layers, or full weights in place."""
    from mlx_lm.tuner.utils import load_adapters

    try:
        load_adapters(model, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"model.adapter_path: the adapter in {folder} does not fit the model: {error} "
            "Use the model that it was trained on."
        ) from error

    _match_dtypes(model)


def _match_dtypes(model: nn.Module) -> None:
    """Cast LoRA tensors, which mlx-lm makes float32, to the dtype of the weights they adapt.

    With float32 factors MLX copies every layer's bfloat16 input and output to float32, which is
    more than half of a step's activations. The optimiser keeps float32 masters of tensors in lower
    precision. DoRA stays float32, because its magnitude over the norm of the weights must be
    exactly 1 before the first step.
    """
    for module in model.modules():
        if "lora_a" not in module or "m" in module:  # `m` is DoRA's magnitude
            continue

        wrapped = cast(nn.Module, module["linear" if "linear" in module else "embedding"])
        scales = cast(mx.array, wrapped["scales"] if "scales" in wrapped else wrapped["weight"])
        if mx.issubdtype(scales.dtype, mx.floating):
            for name in ("lora_a", "lora_b"):
                module[name] = cast(mx.array, module[name]).astype(scales.dtype)
