"""Digests that show whether two processes hold the same model and the same tokenizer.

They are computed from files, not from loaded arrays, so that a learner on CPU (float32) and an
actor on Metal (bfloat16) agree when they were given the same model.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

WHOLE_FILE_BYTES = 64 * 1024 * 1024
SAMPLES = 64
SAMPLE_BYTES = 64 * 1024

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)


def model_digest(folder: Path, *, quantize_bits: int, quantize_group_size: int) -> str:
    """Digest the base weights in `folder` and how they are quantised at load.

    Of each weight file it covers the name, the size, the safetensors header (all names, shapes and
    dtypes) and the content: all of it up to 64 MiB, and above that 64 evenly spaced samples of
    64 KiB including both ends. So gigabytes take milliseconds, and any training run or conversion
    changes the digest; an edit of single bytes in a large file may not.
    """
    digest = hashlib.sha256()

    # Sorted, so that the formatting of config.json does not matter.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())

    for path in sorted(folder.glob("model*.safetensors")):
        for part in _weight_parts(path):
            digest.update(part)

    if quantize_bits:
        digest.update(f"quantize {quantize_bits} {quantize_group_size}".encode())
    return digest.hexdigest()


def tokenizer_digest(folder: Path, *, chat_template: object, stop_token_ids: Iterable[int]) -> str:
    """Digest the vocabulary files in `folder`, the chat template in use and the stop tokens.

    `chat_template` is a string, None, or the name-to-template mapping that some tokenizers have.
    """
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(json.dumps([chat_template, sorted(stop_token_ids)], sort_keys=True).encode())
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Digest an adapter folder in mlx-lm's format: all of its weights, and its configuration."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapters.safetensors"):
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def _weight_parts(path: Path) -> Iterator[bytes]:
    """Yield a weight file's name, size, header, and content, or samples of it if it is large."""
    size = path.stat().st_size
    yield f"{path.name} {size}".encode()
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            yield file.read()
            return

        # A safetensors file begins with the length of its JSON header in 8 bytes.
        header_size = int.from_bytes(file.read(8), "little")
        yield file.read(min(header_size, WHOLE_FILE_BYTES))

        for sample in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)
