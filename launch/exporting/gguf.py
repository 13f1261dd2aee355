"""A fused model as GGUF, by mlx-lm's converter."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx and mlx-lm are only partly typed)

from typing import TYPE_CHECKING, Any

from launch.exporting.result import Exported

if TYPE_CHECKING:
    import mlx.nn as nn

GGUF_TYPES = ("llama", "mistral", "mixtral")  # those that mlx-lm's converter supports
GGUF_NAME = "model-f16.gguf"


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
    fields = {"num_key_value_heads": config["num_attention_heads"], **config}
    convert_to_gguf(result.folder, weights, fields, str(path))
    result.gguf = path
    result.notes.append(
        "mlx-lm's GGUF declares a SentencePiece vocabulary without its scores; if the text comes "
        f"out garbled, convert {result.folder} with llama.cpp's convert_hf_to_gguf.py instead."
    )
