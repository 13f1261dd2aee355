"""A second tree over a policy's arrays, and policies that pass from one tree to the other."""

from pathlib import Path

import mlx.core as mx
import pytest

from protocol.config.settings import LoraSettings, ModelSettings
from protocol.errors import SnapshotError
from protocol.model.policy import load_policy
from protocol.model.policy_shelf import PolicyShelf
from protocol.model.snapshots import load_trainable, tensors_digest, trainable
from protocol.model.views import second_tree
from tests.tiny import tensors, write_model_folder

TOKENS = mx.array([[5, 9, 2, 30]])


def adapted(folder: Path, **changes: object):
    lora = LoraSettings(rank=4, dropout=0.5)
    settings = {"path": str(write_model_folder(folder / "m")), "lora": lora, **changes}
    return load_policy(ModelSettings(**settings), seed=3).model  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_two_trees_share_every_array_until_one_is_updated(tmp_path, kind):
    model = adapted(tmp_path, fine_tune_type=kind)
    second = second_tree(model)
    first_arrays, second_arrays = tensors(model), tensors(second)
    assert list(first_arrays) == list(second_arrays)
    assert all(second_arrays[name] is array for name, array in first_arrays.items())
    assert list(trainable(second)) == list(trainable(model))

    before = model(TOKENS)
    shifted = {name: array + 0.01 for name, array in trainable(model).items()}
    load_trainable(model, shifted, "update")
    after = model(TOKENS)
    assert not mx.allclose(before, after, atol=1e-4)
    assert mx.array_equal(second(TOKENS), before)

    load_trainable(second, trainable(model), "swap")
    assert all(tensors(second)[name] is array for name, array in tensors(model).items())
    assert mx.array_equal(second(TOKENS), after)


def test_modes_and_frozen_layers_of_one_tree_leave_the_other_alone(tmp_path):
    model = adapted(tmp_path)
    shifted = {name: array + 0.01 for name, array in trainable(model).items()}
    load_trainable(model, shifted, "update")
    second = second_tree(model)
    expected = model(TOKENS)
    model.train()
    mx.random.seed(0)
    dropped = model(TOKENS)
    assert not mx.array_equal(dropped, expected)
    assert mx.array_equal(second(TOKENS), expected)
    assert all(not module.training for module in second.modules())

    second.freeze()
    assert not trainable(second)
    assert len(trainable(model)) == 2 * 2 * 7
    mx.random.seed(0)
    assert mx.array_equal(model(TOKENS), dropped)


@pytest.mark.parametrize("bypass", [False, True])
def test_frozen_weights_that_one_tree_moves_are_moved_in_the_other(tmp_path, bypass):
    model = adapted(tmp_path)
    before = model(TOKENS)
    apart = second_tree(model, bypass_adapters=bypass)
    second = second_tree(model, bypass_adapters=bypass, keep_wrapped=True)
    trained = list(trainable(second))
    assert len(trained) == (0 if bypass else 28)

    moved = [module.linear for module in model.modules() if "lora_a" in module]
    assert len(moved) == 14
    for linear in moved:
        stack = mx.concatenate([linear.weight, mx.zeros((3, linear.weight.shape[1]))])
        linear.weight = stack[:-3]
    shared = {id(array) for array in tensors(model).values()}
    assert all(id(array) in shared for array in tensors(second).values())
    assert sum(id(array) not in shared for array in tensors(apart).values()) == 14
    assert mx.array_equal(second(TOKENS), before)  # new adapters add nothing

    # What is trained is not shared.
    shifted = {name: array + 0.01 for name, array in trainable(model).items()}
    load_trainable(model, shifted, "update")
    assert not mx.allclose(model(TOKENS), before, atol=1e-4)
    assert mx.array_equal(second(TOKENS), before)
    assert list(trainable(second)) == trained


def test_a_shelf_gives_each_version_once_and_forgets_older_ones():
    shelf = PolicyShelf()
    arrays = [{"a": mx.array([float(version)])} for version in range(4)]
    digests = [tensors_digest(each) for each in arrays]
    for version in range(3):
        shelf.put(version, digests[version], arrays[version])
    assert shelf.take(1, digests[1])["a"] is arrays[1]["a"]
    for passed in (0, 1):
        with pytest.raises(SnapshotError, match=rf"policy version {passed}.*held: \[2\]"):
            shelf.take(passed, digests[passed])

    # A step that the optimiser skipped: another version of the same tensors.
    shelf.put(3, digests[2], arrays[2])
    with pytest.raises(SnapshotError, match=f"{digests[3][:12]}.*got {digests[2][:12]}"):
        shelf.take(3, digests[3])
    assert shelf.take(2, digests[2]) is arrays[2]
    assert shelf.take(3, digests[2]) is arrays[2]
