"""Snapshots: complete or not at all, checked before they are applied."""

import errno
import os

import mlx.core as mx
import mlx.nn as nn
import pytest

from protocol.errors import SnapshotError
from protocol.model.snapshots import (
    apply_snapshot,
    read_snapshot,
    read_tensors,
    tensors_digest,
    trainable,
    write_snapshot,
)


def two_layers(seed=0):
    mx.random.seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_snapshot_carries_every_bit(tmp_path, dtype):
    model, other = two_layers(1), two_layers(2)
    model.set_dtype(dtype)
    other.set_dtype(dtype)
    path = tmp_path / "policy.safetensors"
    written = write_snapshot(path, model, 7)
    assert written.version == 7
    assert written.size == path.stat().st_size
    for source in (path, path.read_bytes(), memoryview(path.read_bytes())):
        snapshot = read_snapshot(source)
        assert (snapshot.version, snapshot.digest) == (7, written.digest)
    apply_snapshot(other, snapshot)
    assert tensors_digest(trainable(other)) == written.digest
    assert os.listdir(tmp_path) == ["policy.safetensors"]
    assert read_tensors(path.read_bytes(), "")[0].keys() == trainable(model).keys()


def test_the_digest_covers_names_shapes_dtypes_and_bytes():
    base = {"a": mx.array([1.0, 2.0]), "b": mx.array(3.0)}
    variants = [
        base,
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"][None], "b": base["b"]},
        {"a": base["a"].view(mx.int32), "b": base["b"]},
        {"a": mx.array([1.0, 2.0000002]), "b": base["b"]},
    ]
    assert len({tensors_digest(arrays) for arrays in variants}) == len(variants)
    assert tensors_digest(dict(reversed(base.items()))) == tensors_digest(base)


def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "policy.safetensors"
    write_snapshot(path, two_layers(), 1)
    target = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2))
    before = tensors_digest(trainable(target))
    with pytest.raises(SnapshotError) as caught:
        apply_snapshot(target, read_snapshot(path))
    text = str(caught.value)
    assert "layers.1.bias: missing" in text
    assert "layers.0.bias: required (5,) F32, got (4,) F32" in text
    assert tensors_digest(trainable(target)) == before
    half = two_layers()
    half.set_dtype(mx.float16)
    with pytest.raises(SnapshotError, match=r"required .* F16, got .* F32"):
        apply_snapshot(half, read_snapshot(path))


def test_damaged_bytes_are_refused(tmp_path):
    path = tmp_path / "policy.safetensors"
    write_snapshot(path, two_layers(), 1)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    with pytest.raises(SnapshotError, match="The file is damaged"):
        read_snapshot(bytes(flipped))
    for bad in (b"", b"no snapshot at all", good[:40], good[: len(good) // 2]):
        with pytest.raises(SnapshotError):
            read_snapshot(bad)
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), {"a": mx.array([1.0])})
    with pytest.raises(SnapshotError, match="required a snapshot of format 2"):
        read_snapshot(tmp_path / "plain.safetensors")
    with pytest.raises(SnapshotError, match="Cannot read the snapshot"):
        read_snapshot(tmp_path / "missing.safetensors")


def test_a_full_disk_leaves_the_old_file_and_no_part_of_a_new_one(tmp_path, monkeypatch):
    path = tmp_path / "policy.safetensors"
    first = write_snapshot(path, two_layers(1), 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SnapshotError, match="No space left on device"):
        write_snapshot(path, two_layers(2), 2)
    assert os.listdir(tmp_path) == ["policy.safetensors"]
    assert read_snapshot(path).digest == first.digest
