"""Every model type of mlx-lm decodes in the engine as it does alone, in slots where it can."""

import re
from pathlib import Path

import pytest

from actors.engine.decoding.trials import Trial, decoding_path
from tests.actors.engine.alone import differences
from tests.architectures import ARCHITECTURES, NOT_BUILT, build, model_types, vocab_size

ROOT = Path(__file__).resolve().parents[3]

# Their layers keep states, or caches of two kinds at once.
BATCHED = {
    "baichuan_m1", "bailing_hybrid", "bailing_moe_linear", "bailing_moe_v3", "deepseek_v32",
    "falcon_h1", "gear", "gemma3n", "glm_moe_dsa", "granitemoehybrid", "jamba", "kimi_k3",
    "kimi_linear", "lfm2", "lfm2-vl", "lfm2_moe", "longcat_flash", "longcat_flash_ngram", "mamba",
    "mamba2", "minimax_m3_vl", "nemotron_h", "olmo_hybrid", "plamo2", "qwen3_5", "qwen3_5_moe",
    "qwen3_next", "rwkv7",
}  # fmt: skip

# mlx-lm cannot batch their caches, or is wrong in a batch.
ALONE = {
    "afm7", "deepseek_v41", "gemma2", "gpt_bigcode", "llama4", "phi3small", "plamo3",
    "recurrent_gemma",
}  # fmt: skip


def test_every_model_type_is_tried_or_named():
    assert set(model_types()) == ARCHITECTURES.keys() | NOT_BUILT.keys()
    assert not ARCHITECTURES.keys() & NOT_BUILT.keys()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_ragged_batch_decodes_as_each_completion_alone(model_type):
    model = build(model_type)
    expected = "batched" if model_type in BATCHED else "alone" if model_type in ALONE else "slots"
    assert decoding_path(Trial(model))[0] == expected

    difference, _ = differences(model, vocab_size(model_type))
    assert difference < 5e-5


def test_the_page_names_every_model_type_under_its_way():
    page = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    before, table = page.split("| not in slots |")
    table, after = table.split("\nNot tried:")
    assert named(before.split("\nIn slots:")[1]) == ARCHITECTURES.keys() - BATCHED - ALONE

    for way, expected in (("batched", BATCHED), ("alone", ALONE)):
        rows = [line.split(" | ")[0] for line in table.splitlines() if f" | {way} | " in line]
        assert named("".join(rows)) == expected
    assert named(after.split("\n\n")[0]) == NOT_BUILT.keys()


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))
