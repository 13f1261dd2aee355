"""Loading policies, which of their tensors are trained, and adapters in mlx-lm's format."""

import json

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm import load as mlx_lm_load

from protocol.config.settings import LoraSettings, ModelSettings
from protocol.errors import ModelError
from protocol.model.adapters import save_adapters
from protocol.model.base_model import model_folder
from protocol.model.policy import load_policy
from protocol.model.snapshots import trainable
from tests.tiny import VOCAB, tensors, write_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model"))


def settings_of(folder, **changes):
    return ModelSettings(path=str(folder), quantize_group_size=32, **changes)


def same(left, right):
    return left.keys() == right.keys() and all(
        mx.array_equal(left[name], right[name]).item() for name in left
    )


def perturb(model, scale=0.05):
    mx.random.seed(5)
    for name, array in trainable(model).items():
        model.load_weights([(name, array + scale * mx.random.normal(array.shape))], strict=False)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        # 7 linear layers in each of 2 layers; DoRA adds a magnitude to the two factors.
        ("lora", {0: 28, 4: 28}),
        ("dora", {0: 42, 4: 42}),
        # Full: embedding, final norm, 2 x (7 linears, 4 norms); in 4 bits each of the 15 packed
        # layers has scales and biases instead of a weight.
        ("full", {0: 24, 4: 39}),
    ],
)
def test_what_is_trained(folder, kind, tensors, bits):
    policy = load_policy(settings_of(folder, fine_tune_type=kind, quantize_bits=bits), seed=1)
    arrays = trainable(policy.model)
    assert len(arrays) == tensors[bits]
    assert list(arrays) == sorted(arrays)
    assert {array.dtype for array in arrays.values()} == {mx.float32}
    assert policy.stop_token_ids == (1,)
    assert policy.vocab_size == VOCAB
    assert not policy.model.training


def test_fresh_adapters_leave_the_model_as_it_is_and_follow_the_seed(folder):
    plain = mlx_lm_load(str(folder))[0]
    mx.random.seed(77)
    untouched = mx.random.uniform(shape=(3,))
    mx.random.seed(77)
    first = load_policy(settings_of(folder), seed=1)
    assert mx.array_equal(mx.random.uniform(shape=(3,)), untouched)
    again, other = (load_policy(settings_of(folder), seed=seed) for seed in (1, 2))
    assert same(trainable(first.model), trainable(again.model))
    assert not same(trainable(first.model), trainable(other.model))
    tokens = mx.array([[4, 9, 33]])
    assert mx.array_equal(first.model(tokens), plain(tokens))


def test_digests_know_the_weights_the_quantisation_and_the_template(folder, tmp_path):
    first = load_policy(settings_of(folder), seed=1)
    assert first.model_digest == load_policy(settings_of(folder), seed=9).model_digest
    twin = write_model_folder(tmp_path / "twin")
    other = write_model_folder(tmp_path / "other", seed=1)
    assert load_policy(settings_of(twin), seed=1).model_digest == first.model_digest
    assert load_policy(settings_of(other), seed=1).model_digest != first.model_digest
    quantised = load_policy(settings_of(folder, quantize_bits=4), seed=1)
    assert quantised.model_digest != first.model_digest
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    told = load_policy(settings_of(folder, chat_template=str(template)), seed=1)
    assert told.tokenizer_digest != first.tokenizer_digest
    assert told.tokenizer.chat_template == "{{ messages[0].content }}"
    assert told.tokenizer.has_chat_template


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_saved_adapters_load_in_mlx_lm_and_start_a_run(folder, tmp_path, kind):
    settings = settings_of(folder, fine_tune_type=kind)
    policy = load_policy(settings, seed=1)
    perturb(policy.model)
    save_adapters(tmp_path / "adapters", policy.model, policy.adapter_config, str(folder))
    tokens = mx.array([[4, 9, 33]])
    loaded = mlx_lm_load(str(folder), adapter_path=str(tmp_path / "adapters"))[0]
    assert mx.array_equal(loaded(tokens), policy.model(tokens))
    if kind != "full":  # a run from full weights names them as its model
        start = settings_of(folder, fine_tune_type=kind, adapter_path=str(tmp_path / "adapters"))
        again = load_policy(start, seed=2)
        assert same(trainable(again.model), trainable(policy.model))
        assert again.model_digest == policy.model_digest
        assert again.adapter_digest
        assert again.adapter_digest != policy.adapter_digest


def test_another_kind_of_adapter_is_refused_with_what_to_set(folder, tmp_path):
    policy = load_policy(settings_of(folder), seed=1)
    save_adapters(tmp_path, policy.model, policy.adapter_config, str(folder))
    for kind in ("dora", "full"):
        settings = settings_of(folder, fine_tune_type=kind, adapter_path=str(tmp_path))
        with pytest.raises(ModelError, match=r'Set model.fine_tune_type = "lora"'):
            load_policy(settings, seed=1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["lora_parameters"]["rank"] = 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit the model"):
        load_policy(settings_of(folder, adapter_path=str(tmp_path)), seed=1)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_of_full_weights_is_refused_as_a_start(folder, tmp_path, kind):
    policy = load_policy(settings_of(folder, fine_tune_type="full"), seed=1)
    save_adapters(tmp_path, policy.model, policy.adapter_config, str(folder))
    settings = settings_of(folder, fine_tune_type=kind, adapter_path=str(tmp_path))
    with pytest.raises(ModelError, match=r"holds a full adapter.*mlx_lm\.fuse first"):
        load_policy(settings, seed=1)


def test_a_dtype_can_be_asked_for(folder):
    policy = load_policy(settings_of(folder, fine_tune_type="full", dtype="bfloat16"), seed=1)
    assert {array.dtype for array in trainable(policy.model).values()} == {mx.bfloat16}
    stored = load_policy(settings_of(folder, dtype="bfloat16", quantize_bits=4), seed=1)
    dtypes = {array.dtype for array in tensors(stored.model).values()}
    assert dtypes == {mx.bfloat16, mx.uint32}


def test_lora_takes_the_dtype_of_what_it_adapts_and_dora_stays_exact(folder, tmp_path):
    lora = load_policy(settings_of(folder, dtype="bfloat16"), seed=1)
    assert {array.dtype for array in trainable(lora.model).values()} == {mx.bfloat16}
    plain = load_policy(settings_of(folder, fine_tune_type="full", dtype="bfloat16"), seed=1)
    dora = load_policy(settings_of(folder, fine_tune_type="dora", dtype="bfloat16"), seed=1)
    assert {array.dtype for array in trainable(dora.model).values()} == {mx.float32}
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(dora.model(ids), plain.model(ids))
    # mlx-lm's own adapters are float32.
    save_adapters(tmp_path, load_policy(settings_of(folder), seed=1).model, lora.adapter_config, "")
    loaded = settings_of(folder, dtype="bfloat16", adapter_path=str(tmp_path))
    values = trainable(load_policy(loaded, seed=1).model).values()
    assert {array.dtype for array in values} == {mx.bfloat16}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": ""}, "model.path is empty"),
        ({"path": "/no/such/folder"}, "there is no model folder at /no/such/folder"),
        ({"lora": LoraSettings(keys=["nothing"])}, "model.lora.keys names no layer"),
        ({"quantize_bits": 4, "quantize_group_size": 128}, "divides no layer"),
        ({"adapter_path": "/no/such/adapter"}, "is not an adapter folder in mlx-lm's format"),
        ({"chat_template": "/no/such/file"}, "model.chat_template: cannot read"),
    ],
)
def test_faults_say_what_to_do(folder, change, says):
    with pytest.raises(ModelError, match=says):
        load_policy(ModelSettings(**({"path": str(folder)} | change)), seed=1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Fake a hub with one model; return its folder, and the downloads requested."""
    folder = write_model_folder(tmp_path / "hub")
    asked = []

    def download(path, revision=None, allow_patterns=None):
        assert (path, revision) == ("someone/model", None)
        asked.append(allow_patterns)
        return folder

    monkeypatch.setattr(mlx_lm.utils, "_download", download)
    return folder, asked


def test_a_model_of_the_hub_is_fetched_after_its_configuration(hub):
    folder, asked = hub
    assert model_folder("someone/model") == folder
    assert asked == [["config.json", "adapter_config.json"], None]


def test_a_vision_model_of_the_hub_is_refused_before_its_weights_are_fetched(hub):
    folder, asked = hub
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 2}}))
    with pytest.raises(ModelError, match="someone/model is a vision-language model"):
        model_folder("someone/model")
    assert asked == [["config.json", "adapter_config.json"]]


def test_models_that_cannot_be_used_are_refused(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change, says in (
        ({"vision_config": {"depth": 2}}, "is a vision-language model"),
        ({"model_type": "no_such_type"}, "mlx-lm cannot load"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=says):
            load_policy(settings_of(folder), seed=1)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        load_policy(settings_of(folder), seed=1)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter; give it as model\.adapter_path"):
        load_policy(settings_of(folder), seed=1)
