"""Snapshots: the trainable tensors of a policy version as one safetensors file.

The metadata holds the manifest: version, and a digest over names, shapes, dtypes and bytes. A
snapshot is applied only to a model whose trainable tensors have exactly these names, shapes and
dtypes, because `nn.Module.load_weights` would silently accept wrong shapes.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# (mlx is only partly typed)

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from protocol.errors import SnapshotError

FORMAT = "2"
SHORT_BYTES = 8
_SAFETENSORS_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}


@dataclass(frozen=True)
class TensorDigests:
    """Digests of tensors: of each one (SHA-256, by name, sorted), and of all of them (hex).

    Each covers name, shape, dtype and bytes; `whole` is the SHA-256 of the others in order.
    """

    each: dict[str, bytes]

    @classmethod
    def of(cls, arrays: dict[str, mx.array]) -> Self:
        """Digest the tensors."""
        raw = _raw_bytes(arrays)
        each: dict[str, bytes] = {}
        for name in sorted(arrays):
            array = arrays[name]
            digest = hashlib.sha256(f"{name} {array.shape} {_dtype_name(name, array)}\n".encode())
            digest.update(raw[name])
            each[name] = digest.digest()
        return cls(each)

    @property
    def whole(self) -> str:
        return hashlib.sha256(b"".join(self.each.values())).hexdigest()

    @property
    def short(self) -> bytes:
        """The first `SHORT_BYTES` of each, joined: enough to tell which tensors differ."""
        return b"".join(digest[:SHORT_BYTES] for digest in self.each.values())

    def differing(self, short: bytes) -> list[str]:
        """Return the names of the tensors that differ from those of which `short` was made."""
        theirs = [short[i : i + SHORT_BYTES] for i in range(0, len(short), SHORT_BYTES)]
        if len(theirs) != len(self.each):
            return list(self.each)
        pairs = zip(self.each.items(), theirs, strict=True)
        return [name for (name, ours), other in pairs if ours[:SHORT_BYTES] != other]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a `Policy` message announces about a snapshot file."""

    version: int
    digests: TensorDigests
    size: int  # bytes of the file

    @property
    def digest(self) -> str:
        return self.digests.whole


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot that was read and matches its digest."""

    version: int
    digest: str
    arrays: dict[str, mx.array]


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable tensors of `model` by name, sorted by name."""
    return dict(sorted(named_arrays(model.trainable_parameters()).items()))


def named_arrays(tree: object) -> dict[str, mx.array]:
    """Return the arrays of a tree of parameters by their dotted names, in its order."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def tensors_digest(arrays: dict[str, mx.array]) -> str:
    """Digest names, shapes, dtypes and bytes of all tensors; see `TensorDigests`."""
    return TensorDigests.of(arrays).whole


def write_snapshot(path: str | Path, model: nn.Module, version: int) -> Written:
    """Write the trainable tensors of `model` to `path`, completely or not at all."""
    arrays = trainable(model)
    digests = TensorDigests.of(arrays)
    metadata = {"pippin_snapshot": FORMAT, "version": str(version), "digest": digests.whole}
    size = write_tensors(path, arrays, metadata)
    return Written(version=version, digests=digests, size=size)


def write_tensors(
    path: str | Path,
    arrays: dict[str, mx.array],
    metadata: dict[str, str],
    written: Callable[[bytes | memoryview], object] = lambda _: None,
) -> int:
    """Write a safetensors file under a temporary name, then rename it; returns its size in bytes.

    `written` is told of all bytes in order, to hash them for example. Raises SnapshotError, and
    leaves nothing behind, if the file cannot be written.
    """
    path = Path(path)
    raw = _raw_bytes(arrays)

    names = sorted(arrays)
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in names:
        array = arrays[name]
        end = offset + array.nbytes
        header[name] = {
            "dtype": _dtype_name(name, array),
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the tensors are aligned to 8 bytes
    head = len(head).to_bytes(8, "little") + head
    size = len(head) + offset

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in (head, *(raw[name] for name in names)):
                file.write(part)
                written(part)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SnapshotError(
            f"Cannot write {size:,} bytes to {path}: {error.strerror or error}. Nothing was left "
            "there. Free space or point run.dir at another disk."
        ) from error

    return size


def read_snapshot(source: str | Path | bytes | bytearray | memoryview) -> Snapshot:
    """Read a snapshot from a file or from its bytes, and check its digest.

    Raises SnapshotError if it cannot be read, is damaged, or is of another format.
    """
    where = str(source) if isinstance(source, str | Path) else f"{len(source):,} bytes received"
    try:
        raw = Path(source).read_bytes() if isinstance(source, str | Path) else source
    except OSError as error:
        raise SnapshotError(
            f"Cannot read the snapshot {where}: {error.strerror or error}. "
            "A superseded version is deleted; ask for the newest."
        ) from error

    arrays, metadata = read_tensors(raw, where)
    if metadata.get("pippin_snapshot") != FORMAT or "version" not in metadata:
        raise SnapshotError(
            f"{where}: required a snapshot of format {FORMAT}, got metadata {metadata}. "
            "Learner and actor must run the same release of Pippin."
        )

    digest = tensors_digest(arrays)
    if digest != metadata.get("digest"):
        raise SnapshotError(
            f"{where}: the digest of its tensors is {digest[:12]}, its manifest says "
            f"{metadata.get('digest', 'nothing')[:12]}. The file is damaged; fetch it again."
        )
    return Snapshot(version=int(metadata["version"]), digest=digest, arrays=arrays)


def read_tensors(
    raw: bytes | bytearray | memoryview, where: str
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the tensors, evaluated, and the metadata of a safetensors file given as bytes."""
    try:
        loaded = mx.load(io.BytesIO(raw), format="safetensors", return_metadata=True)
        arrays, metadata = cast(tuple[dict[str, mx.array], dict[str, str]], loaded)
        mx.eval(list(arrays.values()))
    except (RuntimeError, ValueError) as error:
        raise SnapshotError(
            f"{where}: not a safetensors file ({error}). It is damaged; fetch it again."
        ) from error
    return arrays, metadata


def apply_snapshot(model: nn.Module, snapshot: Snapshot) -> None:
    """Replace the model's trainable tensors by those of `snapshot`.

    Raises SnapshotError, and leaves the model unchanged, if names, shapes or dtypes differ.
    """
    load_trainable(model, snapshot.arrays, f"snapshot of version {snapshot.version}")


def load_trainable(model: nn.Module, arrays: dict[str, mx.array], what: str) -> None:
    """Replace the trainable tensors of `model` by `arrays`, which must match them exactly.

    Raises SnapshotError, and leaves the model unchanged, if they do not; `what` names their source.
    """
    own = trainable(model)
    faults = [f"{name}: missing" for name in own if name not in arrays]
    for name, array in sorted(arrays.items()):
        mine = own.get(name)
        if mine is None:
            faults.append(f"{name}: not trainable in this model")
        elif (mine.shape, mine.dtype) != (array.shape, array.dtype):
            faults.append(
                f"{name}: required {mine.shape} {_dtype_name(name, mine)}, "
                f"got {array.shape} {_dtype_name(name, array)}"
            )

    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise SnapshotError(
            f"The {what} does not fit the model: {'; '.join(faults[:5])}{more}. "
            "Both sides must load the same model with the same model settings."
        )

    model.load_weights(list(arrays.items()), strict=False)


def _dtype_name(name: str, array: mx.array) -> str:
    found = _SAFETENSORS_NAMES.get(array.dtype)
    if found is None:
        raise SnapshotError(f"{name}: dtype {array.dtype} cannot be stored in safetensors.")
    return found


def _raw_bytes(arrays: dict[str, mx.array]) -> dict[str, memoryview]:
    """Return the bytes of each array, computed at once: on a GPU, each evaluation is waited for."""
    views = {name: array.reshape(-1).view(mx.uint8) for name, array in arrays.items() if array.size}
    mx.eval(list(views.values()))
    found = {name: memoryview(cast(Any, view)) for name, view in views.items()}
    return {name: found.get(name, memoryview(b"")) for name in arrays}
