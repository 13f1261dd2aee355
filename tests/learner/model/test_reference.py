"""The reference policy: what it is, and that 100 updates do not change a bit of it."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import load as mlx_lm_load
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from learner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from learner.model.batches import to_device
from learner.model.logprobs import completion_logprobs
from learner.model.reference import make_reference, view
from learner.optim.step import Step
from protocol.config.settings import OptimizerSettings, PolicySettings
from protocol.errors import ModelError
from protocol.model.adapters import save_adapters
from protocol.model.base_model import load_base
from protocol.model.policy import load_policy
from protocol.model.snapshots import load_trainable, tensors_digest, trainable
from tests.tiny import ragged_batch, tensors, write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model"))


def settings_of(folder, **changes):
    return PolicySettings(path=str(folder), quantize_group_size=32, **changes)


def nll(model, arrays):
    logprobs, *_ = completion_logprobs(
        model, arrays["input_ids"], arrays["positions"], arrays["targets"]
    )
    return -(logprobs * arrays["mask"]).sum(), {}


def logprobs_of(model):
    arrays = to_device(ragged_batch())
    return completion_logprobs(
        model, arrays["input_ids"], arrays["positions"], arrays["targets"], gradient=False
    )[0]


def digest_of(reference):
    """Digest every array of the reference."""
    return tensors_digest(tensors(reference.model))


def step_of(policy):
    settings = OptimizerSettings(learning_rate=1e-3)
    return Step(policy.model, settings, total_steps=200, compiled=False)


def train(policy, updates, step=None):
    step = step or step_of(policy)
    for _ in range(updates):
        step.accumulate(to_device(ragged_batch()), nll)
        step.apply()


def adapter_folder(folder, target, **changes):
    policy = load_policy(settings_of(folder, **changes), seed=3)
    train(policy, 3)
    save_adapters(target, policy.model, policy.adapter_config, str(folder))
    return target


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_initial_reference_is_the_untrained_policy_to_the_bit(folder, kind, bits, dtype):
    settings = settings_of(folder, fine_tune_type=kind, quantize_bits=bits, dtype=dtype)
    policy = load_policy(settings, seed=1)
    assert mx.array_equal(
        logprobs_of(make_reference(policy, settings).model), logprobs_of(policy.model)
    )


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_hundred_steps_and_a_resume_leave_it_bit_identical(folder, tmp_path, kind, bits):
    settings = settings_of(folder, fine_tune_type=kind, quantize_bits=bits)
    policy = load_policy(settings, seed=1)
    base, _ = load_base(settings, folder)
    reference = make_reference(policy, settings)
    digest, before = digest_of(reference), logprobs_of(reference.model)
    assert mx.array_equal(before, logprobs_of(base))
    assert not trainable(reference.model)
    step = step_of(policy)
    train(policy, 50, step)
    save_checkpoint(
        tmp_path, Checkpoint(50, trainable(policy.model), step.state(), b"", {}), keep=1
    )
    train(policy, 50, step)
    assert not mx.array_equal(logprobs_of(policy.model), before)
    assert digest_of(reference) == digest
    assert mx.array_equal(logprobs_of(reference.model), before)

    resumed = load_policy(settings, seed=1)
    again = make_reference(resumed, settings)
    assert (again.digest, digest_of(again)) == (reference.digest, digest)
    checkpoint = load_checkpoint(tmp_path)
    load_trainable(resumed.model, checkpoint.weights, "checkpoint")
    step = step_of(resumed)
    step.load_state(checkpoint.optimizer)
    train(resumed, 50, step)
    straight = trainable(policy.model)
    assert all(mx.array_equal(a, straight[name]) for name, a in trainable(resumed.model).items())
    assert digest_of(again) == digest
    assert mx.array_equal(logprobs_of(again.model), before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_initial_with_an_adapter_is_that_adapter_frozen(folder, tmp_path, kind):
    start = adapter_folder(folder, tmp_path, fine_tune_type=kind)
    settings = settings_of(folder, fine_tune_type=kind, adapter_path=str(start))
    policy = load_policy(settings, seed=1)
    reference = make_reference(policy, settings)
    digest, before = digest_of(reference), logprobs_of(policy.model)
    assert mx.array_equal(logprobs_of(reference.model), before)
    train(policy, 3)
    assert digest_of(reference) == digest
    assert mx.array_equal(logprobs_of(reference.model), before)
    base, _ = load_base(settings, folder)
    bare = make_reference(
        policy, settings_of(folder, fine_tune_type=kind, reference="base", adapter_path=str(start))
    )
    assert mx.array_equal(logprobs_of(bare.model), logprobs_of(base))
    assert bare.digest != reference.digest


def test_an_adapter_or_a_model_can_be_the_reference(folder, tmp_path):
    start = adapter_folder(folder, tmp_path / "adapter")
    other = write_model_folder(tmp_path / "other", seed=8)
    plain = load_policy(settings_of(folder, adapter_path=str(start)), seed=1)
    wanted = {
        start: logprobs_of(plain.model),
        other: logprobs_of(load_base(settings_of(other), other)[0]),
    }
    digests = set()
    for path, logprobs in wanted.items():
        settings = settings_of(folder, reference=str(path))
        policy = load_policy(settings, seed=1)
        reference = make_reference(policy, settings)
        assert mx.array_equal(logprobs_of(reference.model), logprobs)
        train(policy, 2)
        assert mx.array_equal(logprobs_of(reference.model), logprobs)
        digests.add(reference.digest)
    assert len(digests) == 2


@pytest.mark.parametrize("theirs", ["lora", "dora", "full"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_of_any_kind_is_the_reference_of_a_policy_of_any_kind(
    folder, tmp_path, kind, theirs
):
    other = adapter_folder(folder, tmp_path, fine_tune_type=theirs)
    adapted = mlx_lm_load(str(folder), adapter_path=str(other))[0]
    settings = settings_of(folder, fine_tune_type=kind, reference=str(other))
    policy = load_policy(settings, seed=1)
    begun = logprobs_of(policy.model)
    reference = make_reference(policy, settings)
    assert mx.array_equal(logprobs_of(policy.model), begun)  # the policy did not get the adapter
    train(policy, 2)
    assert mx.array_equal(logprobs_of(reference.model), logprobs_of(adapted))
    assert not mx.array_equal(logprobs_of(adapted), begun)


def test_impossible_references_are_refused(folder, tmp_path):
    settings = settings_of(folder, reference="/no/such/reference")
    policy = load_policy(settings, seed=1)
    with pytest.raises(ModelError, match='"initial", "base", an adapter folder or a model'):
        make_reference(policy, settings)
    small = write_model_folder(tmp_path / "small", vocab_size=63)
    with pytest.raises(ModelError, match="has 63 tokens, the policy 64"):
        make_reference(policy, settings_of(folder, reference=str(small)))


class Mixture(nn.Module):
    """A switch, an embedding and a linear adapter, the last of them twice in the tree."""

    def __init__(self):
        super().__init__()
        self.embedding_adapter = LoRAEmbedding.from_base(nn.Embedding(6, 8), r=2)
        self.experts = LoRASwitchLinear.from_base(SwitchLinear(8, 8, 3, bias=False), r=2)
        self.layers = [LoRALinear.from_base(nn.Linear(8, 8), r=2)]
        self.again = self.layers[0]

    def __call__(self, tokens):
        hidden = self.embedding_adapter(tokens)
        hidden = self.experts(hidden[:, None, None], mx.array([[0], [2]])).reshape(-1, 8)
        return self.again(self.layers[0](hidden))


def test_every_kind_of_adapter_is_bypassed():
    mx.random.seed(0)
    model = Mixture()
    twin = view(model, bypass_adapters=True)
    tokens = mx.array([1, 4])
    before = model(tokens)
    assert mx.array_equal(twin(tokens), before)  # new adapters add nothing
    for module in (model.embedding_adapter, model.experts, model.layers[0]):
        module.lora_b = mx.random.normal(module.lora_b.shape)
    assert not mx.array_equal(model(tokens), before)
    assert mx.array_equal(twin(tokens), before)
    assert model.trainable_parameters().keys() == model.parameters().keys()  # only twin is frozen
    frozen_copy = view(model, bypass_adapters=False)
    assert frozen_copy["again"] is frozen_copy["layers"][0]
    assert mx.array_equal(frozen_copy(tokens), model(tokens))
