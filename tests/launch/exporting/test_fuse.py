"""Exported models against the adapter on its base, in float32."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load

from launch.export import main
from launch.exporting.fuse import export, locate
from launch.exporting.modelfile import family_of, modelfile, template_notes
from protocol.config.settings import LoraSettings, ModelSettings
from protocol.errors import ModelError
from protocol.model.adapters import FineTuneType, save_adapters
from protocol.model.policy import LoadedPolicy, load_policy
from protocol.model.snapshots import trainable
from tests.tiny import write_model_folder

TOKENS = mx.array([[5, 9, 2, 40, 17, 3, 61, 8]])


def tuned(base, folder, kind: FineTuneType) -> tuple[LoadedPolicy, np.ndarray]:
    """Write an adapter that changes the policy; return it with its logits (T, V)."""
    settings = ModelSettings(
        path=str(base), fine_tune_type=kind, lora=LoraSettings(rank=4), dtype="float32"
    )
    policy = load_policy(settings, seed=1)
    mx.random.seed(7)
    changed = {
        name: array + 0.1 * mx.random.normal(array.shape)
        for name, array in trainable(policy.model).items()
    }
    policy.model.load_weights(list(changed.items()), strict=False)
    save_adapters(folder, policy.model, policy.adapter_config, str(base))
    return policy, logits(policy.model)


def logits(model) -> np.ndarray:
    return np.array(model(TOKENS)[0])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_fused_model_has_the_adapters_logits(tmp_path, kind):
    base = write_model_folder(tmp_path / "base")
    _, wanted = tuned(base, tmp_path / "run" / "adapters", kind)
    before = logits(load(str(base))[0])
    assert np.abs(wanted - before).max() > 0.1

    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    model, tokenizer = load(str(tmp_path / "out"))[:2]
    np.testing.assert_allclose(logits(model), wanted, atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in tree_flatten(model.parameters()))
    assert tokenizer.encode("w5 w9") == [5, 9]


@pytest.mark.parametrize("damaged", ["", "[]", '{"best"'])
def test_a_damaged_state_is_named_with_its_file(tmp_path, damaged):
    state = tmp_path / "checkpoints/step-000004/state.json"
    state.parent.mkdir(parents=True)
    state.write_text(damaged)
    with pytest.raises(ModelError, match=r"--best: .*step-000004/state.json is damaged: "):
        locate(tmp_path, "", tmp_path, best=True)


def test_a_best_checkpoint_is_exported_in_place_of_the_last(tmp_path):
    base = write_model_folder(tmp_path / "base")
    run = tmp_path / "run"
    policy, wanted = tuned(base, run / "adapters", "lora")
    step = run / "checkpoints" / "step-000004"
    step.mkdir(parents=True)
    mx.save_safetensors(str(step / "weights.safetensors"), trainable(policy.model))
    (step / "state.json").write_text(json.dumps({"step": 4, "best": {"value": 1, "step": 4.0}}))
    zeros = {name: mx.zeros_like(array) for name, array in trainable(policy.model).items()}
    mx.save_safetensors(str(run / "adapters" / "adapters.safetensors"), zeros)

    export(run, tmp_path / "last")
    export(run, tmp_path / "best", best=True)
    before = logits(load(str(base))[0])
    np.testing.assert_allclose(logits(load(str(tmp_path / "last"))[0]), before, atol=1e-5)
    np.testing.assert_allclose(logits(load(str(tmp_path / "best"))[0]), wanted, atol=1e-5)


def test_gguf_holds_the_fused_weights_under_its_own_names(tmp_path):
    base = write_model_folder(tmp_path / "base", model_type="llama", head_dim=16)
    policy, _ = tuned(base, tmp_path / "adapter", "lora")
    result = export(tmp_path / "adapter", tmp_path / "out", gguf=True)
    assert result.gguf is not None
    assert not result.failed
    loaded: Any = mx.load(str(result.gguf), return_metadata=True)
    arrays, metadata = loaded
    assert metadata["general.architecture"] == "llama"
    assert int(metadata["llama.block_count"].item()) == 2
    assert len(metadata["tokenizer.ggml.tokens"]) == 64
    model: Any = policy.model
    fused = model.layers[1].mlp.up_proj.fuse()
    value = np.array(fused.weight.astype(mx.float16))
    np.testing.assert_array_equal(np.array(arrays["blk.1.ffn_up.weight"]), value)


def test_what_mlx_lm_cannot_write_as_gguf_is_said(tmp_path, capsys):
    base = write_model_folder(tmp_path / "base")
    tuned(base, tmp_path / "adapter", "lora")
    status = main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--gguf", "--ollama"])
    said = capsys.readouterr().out
    assert status == 1
    assert "No GGUF was written: mlx-lm writes GGUF for llama, mistral, mixtral, not for qwen3" in (
        said
    )
    assert "no chat template" in said
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM .\n")
    assert 'PARAMETER stop "<eos>"' in text
    assert not (tmp_path / "out" / "model-f16.gguf").exists()


def test_a_quantised_base_dequantised_keeps_the_adapters_effect(tmp_path):
    source = write_model_folder(tmp_path / "source", hidden_size=64, intermediate_size=64)
    from mlx_lm import convert

    convert(str(source), str(tmp_path / "base"), quantize=True, q_bits=8, q_group_size=32)
    _, wanted = tuned(tmp_path / "base", tmp_path / "adapter", "lora")
    result = export(tmp_path / "adapter", tmp_path / "out", dequantize=True)
    assert result.notes == []
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    np.testing.assert_allclose(logits(load(str(tmp_path / "out"))[0]), wanted, atol=1e-4)
    again = export(tmp_path / "adapter", tmp_path / "packed")
    assert "quantised again" in again.notes[0]


def test_sources_and_targets_that_cannot_be_used(tmp_path):
    with pytest.raises(ModelError, match=r"neither adapter_config.json, nor adapters/, nor model/"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ModelError, match="exists and is not empty"):
        export(tmp_path, tmp_path / "full")


def test_templates_by_family():
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% if tools %}{% endif %}"
    found = family_of(chatml)
    assert found is not None
    assert found.name == "ChatML"
    assert template_notes(chatml)[1] == "Not converted: the chat template's handling of tools."
    text = modelfile("./m.gguf", chatml, ["<|endoftext|>"])
    assert text.splitlines()[0] == "FROM ./m.gguf"
    assert text.splitlines()[-2:] == [
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|im_end|>"',
    ]
    odd = modelfile(".", "{{ messages }}", ['a"b'])
    assert "# The chat template could not be converted" in odd
    assert 'PARAMETER stop "a\\"b"' in odd


def test_what_cannot_be_loaded_or_written_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    base = write_model_folder(tmp_path / "base")
    run, out = tmp_path / "run", tmp_path / "out"
    adapters = run / "adapters"
    tuned(base, adapters, "lora")
    with pytest.raises(ModelError, match=r"nowhere.*cannot be loaded.*--model names the base"):
        export(run, out, model=str(tmp_path / "nowhere"))

    def full(path, *_, **__):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("[write] Unable to write 4 bytes to file.")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_lm.utils.save", full)
        with pytest.raises(ModelError, match="Nothing was left there"):
            export(run, out)
    assert not out.exists()

    (adapters / "adapters.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match=r"adapters: cannot be loaded"):
        export(run, out)
    (adapters / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json: malformed JSON"):
        export(run, out)
    assert not out.exists()
