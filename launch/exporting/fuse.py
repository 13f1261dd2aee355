"""Fuses a run's adapters into its base, and writes the model in mlx-lm's format, and as GGUF."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.exporting.modelfile import modelfile, template_notes
from protocol.errors import ModelError

if TYPE_CHECKING:
    import mlx.nn as nn

log = logging.getLogger("pippin.export")
GGUF_TYPES = ("llama", "mistral", "mixtral")  # those that mlx-lm's converter supports
GGUF_NAME = "model-f16.gguf"


@dataclass
class Exported:
    """What was written to `folder`, with notes on what could not be."""

    folder: Path
    gguf: Path | None = None
    modelfile: Path | None = None
    notes: list[str] = field(default_factory=list[str])
    failed: bool = False


def export(
    source: Path,
    out: Path,
    *,
    model: str = "",
    best: bool = False,
    dequantize: bool = False,
    gguf: bool = False,
    ollama: bool = False,
) -> Exported:
    """Fuse the adapters of `source` and write a model to `out`; ModelError if that fails.

    Weights keep the precision in which they are stored; a quantised layer is quantised again
    after fusing, which rounds, unless `dequantize`.
    """
    from mlx_lm.utils import dequantize_model, save

    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ModelError(f"{out} exists and is not empty: give a new folder")

    # The best checkpoint's adapter is put together in a folder that is needed only for loading.
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = locate(source, model, Path(scratch), best=best)
        network, tokenizer, config = _load(base, adapter)

    result = Exported(out)
    fuse(network, dequantize=dequantize)
    if dequantize:
        network = dequantize_model(network)
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    elif config.get("quantization") and adapter:
        result.notes.append(
            "The base is quantised: the fused layers were quantised again, which rounds. "
            "--dequantize keeps the adapter's effect exactly."
        )

    try:
        save(out, base, network, tokenizer, config, donate_model=False)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(out, ignore_errors=True)  # it did not exist, or was empty
        raise ModelError(
            f"{out}: cannot be written: {error}. Nothing was left there; free some space"
        ) from error

    if gguf:
        write_gguf(result, network, config)
    if ollama:
        write_modelfile(result, config, tokenizer)
    return result


def _load(base: str, adapter: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Return network, tokenizer and configuration of a model with its adapter."""
    from mlx_lm.utils import load

    try:
        loaded: Any = load(base, adapter_path=adapter, return_config=True)
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{base} with {adapter}" if adapter else base
        raise ModelError(
            f"{what}: cannot be loaded: {error}; --model names the base if it has moved"
        ) from error
    return loaded


def locate(
    source: Path, model: str, scratch: Path, *, best: bool = False
) -> tuple[str, str | None]:
    """Return the base's path or hub id and the adapter folder (None: a full model) of `source`."""
    if (source / "adapter_config.json").is_file():
        return _base_of(source, model), str(source)
    if best:
        return _best(source, model, scratch)
    if (source / "model" / "config.json").is_file():
        return str(source / "model"), None
    if (source / "adapters" / "adapter_config.json").is_file():
        return _base_of(source / "adapters", model), str(source / "adapters")
    raise ModelError(
        f"{source} holds neither adapter_config.json, nor adapters/, nor model/: give the folder "
        "of a finished run, or an adapter folder in mlx-lm's format"
    )


def _base_of(adapter: Path, model: str) -> str:
    path = adapter / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{path}: malformed JSON: {error}; give an intact adapter folder"
        ) from error
    base = model or str(settings.get("model") or "")
    if not base:
        raise ModelError(f"{adapter}/adapter_config.json names no base model: give it as --model")
    return base


def _best(run: Path, model: str, scratch: Path) -> tuple[str, str]:
    """Put the best checkpoint's tensors next to the run's adapter configuration."""
    states = sorted((run / "checkpoints").glob("step-*/state.json"))
    best: dict[str, float] = {}
    if states:
        try:
            best = json.loads(states[-1].read_text(encoding="utf-8")).get("best", {})
        except (ValueError, AttributeError) as error:
            raise ModelError(
                f"--best: {states[-1]} is damaged: {error}; leave --best out to export the last "
                "policy"
            ) from error
    weights = run / "checkpoints" / f"step-{int(best.get('step', -1)):06d}" / "weights.safetensors"
    settings = run / "adapters" / "adapter_config.json"
    if not weights.is_file() or not settings.is_file():
        raise ModelError(
            f"--best: {run} has no checkpoint of its best evaluation with adapters (its newest "
            f"checkpoint says best = {best}); leave --best out to export the last policy"
        )
    shutil.copy(weights, scratch / "adapters.safetensors")
    shutil.copy(settings, scratch / "adapter_config.json")
    log.info("best evaluation: step %d", int(best["step"]))
    return _base_of(settings.parent, model), str(scratch)


def fuse(network: "nn.Module", *, dequantize: bool) -> None:
    """Fold every adapter into the layer it wraps, in place."""
    from mlx.utils import tree_unflatten

    fused: list[tuple[str, Any]] = []
    for name, module in network.named_modules():
        layer: Any = module
        if "lora_a" in layer and hasattr(layer, "fuse"):
            fused.append((name, layer.fuse(dequantize=dequantize)))
    network.update_modules(tree_unflatten(fused))


def write_gguf(result: Exported, network: "nn.Module", config: dict[str, Any]) -> None:
    """Write the GGUF, or note why mlx-lm cannot write it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.gguf import convert_to_gguf

    kind = config["model_type"]
    reason = ""
    if kind not in GGUF_TYPES:
        reason = (
            f"mlx-lm writes GGUF for {', '.join(GGUF_TYPES)}, not for {kind}; convert "
            f"{result.folder} with llama.cpp's convert_hf_to_gguf.py"
        )
    elif config.get("quantization"):
        reason = "mlx-lm cannot write quantised weights as GGUF; export with --dequantize"
    if reason:
        result.failed = True
        result.notes.append(f"No GGUF was written: {reason}.")
        return

    # The header says F16, which float32 matrices would contradict.
    weights: Any = {
        name: array.astype(mx.float16) if array.ndim > 1 else array
        for name, array in dict(tree_flatten(network.parameters())).items()
    }

    path = result.folder / GGUF_NAME
    fields = {"num_key_value_heads": config["num_attention_heads"], **config}  # if it has none
    convert_to_gguf(result.folder, weights, fields, str(path))
    result.gguf = path
    result.notes.append(
        "mlx-lm's GGUF declares a SentencePiece vocabulary without its scores; if the text comes "
        f"out garbled, convert {result.folder} with llama.cpp's convert_hf_to_gguf.py instead."
    )


def write_modelfile(result: Exported, config: dict[str, Any], tokenizer: Any) -> None:  # noqa: ANN401 - mlx-lm's wrapper
    """Write an Ollama Modelfile that loads the GGUF, or else the folder."""
    stops = [str(tokenizer.decode([token])) for token in sorted(tokenizer.eos_token_ids)]
    source = f"./{result.gguf.name}" if result.gguf else "."
    text = modelfile(source, tokenizer.chat_template, [stop for stop in stops if stop])
    result.modelfile = result.folder / "Modelfile"
    result.modelfile.write_text(text, encoding="utf-8")
    result.notes += template_notes(tokenizer.chat_template)
    if config.get("quantization"):
        result.notes.append("Ollama cannot read MLX's quantised weights: export with --dequantize.")
        result.failed = True
