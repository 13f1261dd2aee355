"""Pairs by hand-made rewards, and from real actors and reward servers with a tiny model."""

import json

import mlx.core as mx
import numpy as np
import pytest

from launch.pairs import body, read
from launch.processes.pairing import best_and_worst, given_and_own, totals
from learner.data.examples import pairs
from learner.offline.source import open_offline
from protocol.config.settings import ExampleData, ModelSettings, PairsRun
from protocol.errors import ConfigError
from protocol.model.adapters import save_adapters
from protocol.model.policy import load_policy
from protocol.model.snapshots import trainable
from tests.tiny import write_model_folder

NAN = float("nan")
REWARD = """
def words(completions, **kwargs):
    return [sum(int(w[1:]) for w in text.split() if w[1:].isdigit()) / 10 for text in completions]
"""


def scored(text: str) -> float:
    return sum(int(word[1:]) for word in text.split() if word[1:].isdigit()) / 10


def test_best_and_worst_by_weighted_rewards():
    rewards = np.array([[1, 0], [0, 1], [NAN, 3], [NAN, NAN]], np.float32)
    assert totals(rewards, [2.0, 1.0]) == [2.0, 1.0, 3.0, None]
    pair = best_and_worst({"prompt": "p"}, ["a", "b", "c", "d"], rewards, [2.0, 1.0])
    assert pair == {
        "prompt": "p",
        "chosen": "c",
        "rejected": "b",
        "score_chosen": 3.0,
        "score_rejected": 1.0,
    }


def test_groups_without_a_pair_say_why():
    def column(*values: float) -> np.ndarray:
        return np.array(values, np.float32)[:, None]

    row = {"prompt": "p", "answer": "a"}
    assert best_and_worst(row, ["a", "b"], column(1, 1)) == "ties"
    assert best_and_worst(row, ["a", "b"], column(1, NAN)) == "no_rewards"
    assert best_and_worst(row, ["a", " "], column(1, 0)) == "empty_answers"
    assert best_and_worst(row, ["a", "a "], column(1, 0)) == "same_text"
    assert given_and_own(row, "missing", ["b"], column(1)) == "no_given_answer"
    assert given_and_own(row, "answer", ["a"], column(1)) == "same_text"


def test_chats_stay_chats():
    prompt = [{"role": "user", "content": "q"}]
    row = {"prompt": prompt, "answer": "good", "tools": [{"name": "t"}]}
    pair = given_and_own(row, "answer", ["bad"], np.zeros((1, 0), np.float32))
    assert pair == {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
        "score_chosen": None,
        "score_rejected": None,
        "tools": [{"name": "t"}],
    }


def made(tmp_path, *flags: str) -> tuple[int, list[dict], dict[str, int]]:
    """Run launch/pairs.py's body over five prompts; return status, pairs and counts."""
    rows = [{"prompt": f"w{n} w9 w2", "answer": f"w{n} w3"} for n in range(5, 10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        *("--data.path", str(tmp_path / "rows.jsonl"), "--model.dtype", "float32"),
        *("--run.dir", str(tmp_path / "runs"), "--run.name", "p", "--train.batch_size", "2"),
        *("--sampling.max_completion_length", "6", "--sampling.num_generations", "3"),
        *flags,
    )
    status = body(flags)
    folder = tmp_path / "runs" / "p"
    logs = "".join(path.read_text() for path in (folder / "logs").glob("*.log"))
    assert status == 0, logs
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    counts = json.loads((folder / "pairs.json").read_text())
    return status, [json.loads(line) for line in lines], counts


def test_best_and_worst_from_actors_and_rewards(tmp_path, capfd):
    base = write_model_folder(tmp_path / "base")
    (tmp_path / "words.py").write_text(REWARD)
    _, lines, counts = made(
        tmp_path, "--model.path", str(base), "--rewards.functions", f"{tmp_path}/words.py:words"
    )
    assert sum(counts.values()) == 5
    assert counts["pairs"] == len(lines) >= 4
    for line in lines:
        assert line["score_chosen"] == pytest.approx(scored(line["chosen"]))
        assert line["score_rejected"] == pytest.approx(scored(line["rejected"]))
        assert line["score_chosen"] > line["score_rejected"]
    assert len({line["row"] for line in lines}) == len(lines)
    assert f"pairs: {len(lines)}" in capfd.readouterr().out

    policy = load_policy(ModelSettings(path=str(base), dtype="float32"), seed=0)
    data = ExampleData(path=str(tmp_path / "runs/p/pairs.jsonl"), order="sequential")
    sets = open_offline(data, pairs(data, policy.tokenizer), seed=0, batch_size=8)
    examples = sets.next_batch()
    assert examples is not None
    assert len(examples) == len(lines)
    for example, line in zip(examples, lines, strict=True):
        assert policy.tokenizer.decode(example.prompt_ids) == line["prompt"]
        assert policy.tokenizer.decode(example.chosen_ids[:-1]) == line["chosen"].strip()


def test_given_answers_against_the_base_without_its_adapter(tmp_path, capfd):
    from mlx_lm.generate import batch_generate
    from mlx_lm.utils import load

    base = write_model_folder(tmp_path / "base")
    policy = load_policy(ModelSettings(path=str(base), dtype="float32"), seed=1)
    mx.random.seed(3)
    loud = {k: 3 * mx.random.normal(v.shape) for k, v in trainable(policy.model).items()}
    policy.model.load_weights(list(loud.items()), strict=False)
    save_adapters(tmp_path / "adapter", policy.model, policy.adapter_config, str(base))
    adapter = ["--model.path", str(base), "--model.adapter_path", str(tmp_path / "adapter")]
    flags = ["--mode", "given", "--sampling.temperature", "1e-4", "--train.max_steps", "9"]
    _, lines, counts = made(tmp_path, *adapter, *flags)

    assert sum(counts.values()) == 5  # nine batches of two would repeat them
    logs = "".join(path.read_text() for path in (tmp_path / "runs/p/logs").glob("*.log"))
    assert "all rows are paired after 3 of train.max_steps = 9 batches" in logs
    assert "model.adapter_path = " in capfd.readouterr().err
    assert counts["pairs"] == len(lines) >= 4
    loaded = load(str(base))
    for line in lines:
        assert line["chosen"] == line["prompt"].split()[0] + " w3"
        ids = loaded[1].encode(line["prompt"])
        greedy = batch_generate(loaded[0], loaded[1], [ids], max_tokens=6).texts[0]
        assert line["rejected"].split() == greedy.split()


def test_settings_that_train_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"objective\.beta: launch/grpo\.py and .* read it"):
        read(["--objective.beta", "0.1"])
    with pytest.raises(ConfigError, match="cannot be resumed"):
        read(["--run.resume", str(tmp_path)])
    assert PairsRun().pairs.mode == "best_worst"


def test_what_a_file_holds_is_never_written_over(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w5"}\n')
    flags = [f"--data.path={rows}", f"--model.path={tmp_path}", f"--run.dir={tmp_path / 'runs'}"]
    flags += ["--run.name=p", "--rewards.functions=a.py:f"]
    with pytest.raises(ConfigError, match=r"rows\.jsonl: already holds 17 bytes; name another"):
        read([*flags, f"--pairs.output={rows}"])
    assert rows.read_text() == '{"prompt": "w5"}\n'
    with pytest.raises(ConfigError, match="cannot be written"):
        read([*flags, f"--pairs.output={rows / 'pairs.jsonl'}"])
    run, _ = read([*flags, f"--pairs.output={tmp_path / 'new' / 'pairs.jsonl'}"])
    assert run.pairs.output.endswith("new/pairs.jsonl")
