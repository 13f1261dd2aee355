"""Finds, checks and loads the base model and its tokenizer; quantises the model on request."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from protocol.config.settings import ModelSettings
from protocol.errors import ModelError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_VISION_KEYS = ("vision_config", "vision_tower", "visual", "mm_vision_tower")
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def model_folder(path: str, revision: str | None = None) -> Path:
    """Return the local folder of a model given by folder or hub id; download it from the hub.

    Raises ModelError if there is none, and before the weights are downloaded if its config.json
    is of a model that cannot be trained.
    """
    if not path:
        raise ModelError("model.path is empty: set it to a model's folder or hub id.")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder

    # What looks like a path must not be looked up on the hub, whose ids are NAME or OWNER/NAME.
    if folder.exists() or path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise ModelError(
            f"model.path: there is no model folder at {path}. Give the folder that holds "
            "config.json and model*.safetensors, or a hub id such as mlx-community/NAME."
        )

    from mlx_lm.utils import _download  # pyright: ignore[reportPrivateUsage]

    configs = ["config.json", "adapter_config.json"]
    try:
        _read_config(Path(_download(path, revision=revision, allow_patterns=configs)), path)
        return Path(_download(path, revision=revision))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path: {path} is neither a local folder nor a model that the hub gives us "
            f"({type(error).__name__}: {_first_line(error)}). Check the name, the network and, for "
            "gated models, `hf auth login`; or download it and give its folder."
        ) from error


def load_base(settings: ModelSettings, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load the base model of `folder`, cast and quantised as `settings` say; nothing is frozen.

    Returns the model and its config.json. Raises ModelError if mlx-lm cannot load it.
    """
    from mlx_lm.utils import load_model

    config = _read_config(folder, settings.path)
    try:
        model, config = load_model(folder, lazy=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.path: mlx-lm cannot load {settings.path} (model_type "
            f"{config.get('model_type')!r}): {_first_line(error)}. Check that the folder is "
            "complete and that this mlx-lm knows the model type; `mlx_lm.convert` makes a folder "
            "that it can read."
        ) from error

    dtype = _load_dtype(settings)
    if dtype is not None:
        model.set_dtype(dtype)
    if settings.quantize_bits:
        _quantize(model, settings)
    mx.eval(model.parameters())
    return model, config


def _read_config(folder: Path, path: str) -> dict[str, Any]:
    """Return the config.json of the model that `path` names; refuse what is not a text model."""
    from mlx_lm.utils import load_config

    try:
        config = load_config(folder)
    except (OSError, ValueError) as error:
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"model.path: {path} holds an adapter; give it as model.adapter_path, and its "
                "base model as model.path"
            ) from error
        raise ModelError(
            f"model.path: {path} has no readable config.json ({_first_line(error)}). "
            "Give a folder in mlx-lm's format; `mlx_lm.convert` makes one."
        ) from error

    found = [key for key in _VISION_KEYS if config.get(key)]
    if found:
        raise ModelError(
            f"model.path: {path} is a vision-language model (model_type "
            f"{config.get('model_type')!r}, {found[0]} in its config.json); Pippin trains text "
            "models only. Use the text-only release of this model."
        )
    return config


def _load_dtype(settings: ModelSettings) -> mx.Dtype | None:
    if settings.dtype != "auto":
        return _DTYPES[settings.dtype]
    # MLX's 16-bit matrix products on CPU are about twenty times slower than its 32-bit ones.
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else None


def _quantize(model: nn.Module, settings: ModelSettings) -> None:
    """Quantise in place every layer that can be; raises ModelError if none can, or if one is."""
    bits, group_size = settings.quantize_bits, settings.quantize_group_size
    quantised = [module for module in model.modules() if "scales" in module]
    if quantised:
        stored = getattr(quantised[0], "bits", None)
        raise ModelError(
            f"model.quantize_bits = {bits}, but {settings.path} is stored in {stored} bits. "
            "Set model.quantize_bits = 0, or give the model's unquantised release."
        )

    chosen = getattr(model, "quant_predicate", None)  # a model's own choice of layers

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module["weight"].shape[-1] % group_size:
            return False
        return True if chosen is None else chosen(path, module)

    try:
        nn.quantize(model, group_size, bits, class_predicate=predicate)
    except ValueError as error:
        raise ModelError(
            f"model.quantize_bits = {bits}, model.quantize_group_size = {group_size}: "
            f"{_first_line(error)}. MLX has groups of 32, 64 and 128."
        ) from error

    if not any("scales" in module for module in model.modules()):
        raise ModelError(
            f"model.quantize_group_size = {group_size} divides no layer of {settings.path}. "
            "Use 32 or 64, or set model.quantize_bits = 0."
        )


def load_tokenizer(
    settings: ModelSettings, folder: Path, config: dict[str, Any]
) -> "TokenizerWrapper":
    """Load the tokenizer of `folder`, with the chat template that `settings` name.

    Raises ModelError if it cannot be loaded, and if no stop token is known.
    """
    from mlx_lm.utils import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"model.path: {settings.path} has no tokenizer that can be loaded "
            f"({_first_line(error)}). It needs tokenizer.json and tokenizer_config.json."
        ) from error

    if settings.chat_template:
        try:
            template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"model.chat_template: cannot read {settings.chat_template} "
                f"({_first_line(error)}). Give a text file with a Jinja template."
            ) from error
        tokenizer.chat_template = template
        tokenizer.has_chat_template = True

    if not tokenizer.eos_token_ids:
        raise ModelError(
            f"model.path: neither the tokenizer nor generation_config.json of {settings.path} "
            "names a stop token. Set eos_token_id in its generation_config.json."
        )
    return tokenizer


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
