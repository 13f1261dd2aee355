"""Comparisons: figures by hand, pages from records, and three real runs of a tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli.command_line import read_command_line
from launch.compare import compare, main
from launch.pages.judge import Judge
from launch.pages.win_rate import WinRate, first_answers, latest_answers, recorded_scores, win_rate
from launch.run_folder.tail import parse_lines
from learner.build.offline import assemble_offline
from protocol.config.settings import PreferenceRun
from protocol.errors import ConfigError
from protocol.run_record import RunRecord, write_run
from tests.tiny import write_model_folder

REWARD = """
def words(completions, chosen=None, **kwargs):
    return [None if not text else float(len(text.split())) for text in completions]
"""


def test_win_rate_by_hand():
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 1.0, "e": 9.0}
    second = {"a": 0.0, "b": 2.0, "c": 4.0, "d": 0.5, "f": 0.0}
    result = win_rate(first, second)
    assert result == WinRate(wins=2, ties=1, losses=1)
    assert result.rate == 0.625
    # Outcomes 1, 0.5, 0, 1: mean 0.625, variance (2.25 / 4) - 0.625**2 = 0.171875, over 4 prompts.
    assert result.error == pytest.approx((0.171875 / 4) ** 0.5)
    assert win_rate(second, first).rate == 0.375


def test_answers_are_of_the_newest_version_and_scored():
    rollouts = [
        {"kind": "eval", "trained_at": 0, "prompt": "p", "completions": ["old"]},
        {"kind": "train", "trained_at": 9, "prompt": "p", "completions": ["sampled"]},
        {
            "kind": "eval",
            "trained_at": 4,
            "prompt": "p",
            "completions": ["a b"],
            "rewards": [[1, 2]],
        },
        {"kind": "eval", "trained_at": 4, "prompt": "q", "completions": [""], "rewards": [[None]]},
    ]
    answers = latest_answers(rollouts)
    assert {key: line["completions"][0] for key, line in answers.items()} == {"p": "a b", "q": ""}
    assert recorded_scores(answers) == {"p": 3.0}
    assert {k: line["completions"] for k, line in first_answers(rollouts).items()} == {"p": ["old"]}
    assert first_answers(rollouts[2:]) == {}


def recorded(
    folder: Path, method: str, accuracies: list[float], answers: list[str], chosen: str = ""
) -> Path:
    """Write a run's records by hand; with `chosen`, what the rows hold, also answers "o" at 0."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'[objective]\nmethod = "{method}"\nbeta = 0.1\n')
    write_run(folder, RunRecord(program="preference", state="finished"))
    metrics = [
        {"step": 10 * i, "eval/rewards/accuracies": value, "eval/rewards/margins": value / 10}
        for i, value in enumerate(accuracies)
    ]
    metrics += [
        {"step": 1, "loss": 0.693147, "step_time": 3.0, "num_tokens": 900, "time_s": 4.0},
        {"step": 2, "loss": 0.5, "step_time": 5.0, "num_tokens": 1900, "time_s": 71.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    lines = [
        {"kind": "eval", "trained_at": 20, "prompt": f"p{i}", "completions": [text]}
        for i, text in enumerate(answers)
    ]
    if chosen:
        lines = [{**line, "chosen": chosen} for line in lines]
        lines += [{**line, "trained_at": 0, "completions": ["o"]} for line in lines]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_page_holds_the_figures_escaped_and_alone(tmp_path, capsys):
    (tmp_path / "r.py").write_text(REWARD)
    first = recorded(tmp_path / "a<b", "dpo", [0.5, 0.9, 0.8], ["x y", "x", "<script>alert(1)"])
    second = recorded(tmp_path / "simpo", "simpo", [0.5, 0.6, 0.7], ["x", "x", "x y"])
    out = tmp_path / "page.html"
    reward = f"{tmp_path}/r.py:words"
    assert main([str(first), str(second), "--reward", reward, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text()
    cells = "<td>0.5000 (0)</td><td>0.9000 (10)</td><td>0.8000 (20)</td>"
    assert cells + "<td>0.0500 (0)</td><td>0.0900 (10)</td><td>0.0800 (20)</td>" in page
    assert "<td>0.0500 (0)</td><td>0.0700 (20)</td><td>0.0700 (20)</td>" in page
    # Steps 2, tokens 1,900, median of 3 s and 5 s, 71 s in all.
    assert "<td>2</td><td>1,900</td><td>4</td><td>1:11</td>" in page
    # Words 2, 1, 1 against 1, 1, 2: one win, one tie, one loss.
    assert page.count("0.500 ± 0.236 (1 won, 1 tied, 1 lost)") == 2
    assert "1.333 over 3" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "a&lt;b" in page
    assert not re.search(r"https?://|src=|@import|<link", page)
    assert page.count("<polyline") == 6
    # Two objectives: losses and margins have charts of their own, accuracies share one.
    captions = re.findall(r"<figcaption>(.*?) <span", page)
    assert captions == [
        "loss, a&lt;b", "loss, simpo", "rewards/margins, a&lt;b", "rewards/margins, simpo",
        "eval/rewards/accuracies",
    ]  # fmt: skip
    assert "objective.method" in page
    assert "objective.beta" not in page


def test_answers_compete_with_the_first_ones_and_with_the_chosen(tmp_path):
    (tmp_path / "r.py").write_text(REWARD)
    runs = [
        recorded(tmp_path / "dpo", "dpo", [0.0, 0.75], ["x y", "x y z", "x"], "c d"),
        recorded(tmp_path / "orpo", "orpo", [0.5, 0.5], ["x", "x", ""], "c d"),
    ]
    page = compare(runs, judge=Judge(f"{tmp_path}/r.py:words"))
    # DPO's words 2, 3, 1 against 1 each at first: two won, one tied; against 2 each of the chosen
    # answers one of each. ORPO's 1, 1 and None against the same.
    row = "<td>0.833 ± 0.136 (2 won, 1 tied, 0 lost)</td><td>0.500 ± 0.236 (1 won, 1 tied, 1 lost)"
    assert f"{row}</td>" in page
    row = "<td>0.500 ± 0.000 (0 won, 2 tied, 0 lost)</td><td>0.000 ± 0.000 (0 won, 0 tied, 2 lost)"
    assert f"{row}</td>" in page
    assert "<th>its own first answers</th><th>the dataset&#x27;s chosen answers</th>" in page
    sample = "<td>p1</td><td>o\n[score 1]</td><td>x y z\n[score 3]</td><td>x\n[score 1]</td>"
    assert f"{sample}<td>c d\n[score 2]</td>" in page
    assert "An accuracy of 0 at step 0 is not an error" in page
    assert "in each objective&#x27;s own unit" in page


@pytest.mark.parametrize(
    ("program", "config", "words"),
    [
        ("preference", 'method = "dpo"\nloss_type = ["sigmoid"]', "dpo"),
        ("preference", 'method = "dpo"\nloss_type = ["sigmoid", "ipo"]', "dpo (sigmoid, ipo)"),
        ("preference", 'method = "orpo"\nloss_type = ["sigmoid"]', "orpo"),
        ("grpo", 'loss_type = "dapo"', "grpo (dapo)"),
        ("sft", "completion_only_loss = true", "sft"),
    ],
)
def test_the_objective_in_words(tmp_path, program, config, words):
    run = recorded(tmp_path / "run", "dpo", [0.5], [])
    (run / "config.toml").write_text(f"[objective]\n{config}\n")
    write_run(run, RunRecord(program=program))
    assert f"<tr><td>run</td><td>{words}</td>" in compare([run])


def test_runs_of_one_name_are_told_apart(tmp_path):
    first = recorded(tmp_path / "a" / "run", "dpo", [0.5], ["x"])
    second = recorded(tmp_path / "b" / "run", "dpo", [0.5], ["x"])
    assert "<h1>a/run against b/run against b/run (3)</h1>" in compare([first, second, second])


def test_a_reward_that_hangs_ends_the_comparison_with_a_word(tmp_path, capsys):
    (tmp_path / "r.py").write_text("def hangs(completions, **kwargs):\n    while True: pass\n")
    run = recorded(tmp_path / "a", "dpo", [], ["x"])
    out = tmp_path / "page.html"
    reward = f"{tmp_path}/r.py:hangs"
    flags = ["--reward", reward, "--reward-timeout", "0.2", "--out", str(out)]
    assert main([str(run), *flags]) == 2
    errors = capsys.readouterr().err
    assert f"RewardError: --reward {reward}: hangs: timeout: no answer within 0.2 s" in errors
    assert "at the prompt 'p0'" in errors
    assert not out.exists()


def test_what_is_missing_is_said(tmp_path, capsys):
    run = recorded(tmp_path / "a", "dpo", [], [])
    page = compare([run, run])
    assert "No run has held-out figures" in page
    assert "Fewer than two sets of answers have scores" in page
    with pytest.raises(ConfigError, match="holds no metrics"):
        compare([tmp_path])
    assert main([str(tmp_path)]) == 2
    assert "ConfigError" in capsys.readouterr().err


def test_a_page_that_could_not_be_written_is_refused_before_anything_is_scored(tmp_path, capsys):
    run = recorded(tmp_path / "dpo", "dpo", [0.5], ["x"])
    page = tmp_path / "dpo" / "config.toml" / "page.html"
    flags = ["--reward", f"{tmp_path}/absent.py:words"]
    assert main([str(run), *flags, "--out", str(page)]) == 2
    assert f"--out {page}: cannot be written" in capsys.readouterr().err
    assert main([str(run), *flags, "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_the_recipe_trains_three_and_compares_them(tmp_path, capfd):
    from launch.recipes.compare_preference import main as recipe

    model = write_model_folder(tmp_path / "m")
    rows = [
        {"prompt": f"w{i} ", "chosen": f"w{i + 1} w{i + 2}", "rejected": "w63 w62 w61"}
        for i in range(2, 26)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(REWARD)
    flags = ["--model.path", str(model), "--data.path", str(tmp_path / "rows.jsonl")]
    flags += ["--model.dtype", "float32", "--data.eval_rows", "8", "--train.max_steps", "4"]
    flags += [
        "--eval.max_completion_length",
        "5",
        "--eval.steps",
        "2",
        "--train.length_bucket",
        "4",
    ]
    flags += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]
    flags += ["--optimizer.learning_rate", "1e-2", "--reward", f"{tmp_path}/r.py:words"]
    status = recipe(flags)
    logs = "".join(p.read_text() for p in (tmp_path / "runs").glob("*-*/logs/*.log"))
    assert status == 0, logs + capfd.readouterr().err
    page = (tmp_path / "page.html").read_text()
    # Each of three against two others, its own first answers and the chosen ones.
    assert len(re.findall(r"\d\.\d{3} ± \d\.\d{3} \(", page)) == 12
    dpo = next((tmp_path / "runs").glob("dpo-*")) / "metrics.jsonl"
    lines = [json.loads(line) for line in dpo.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    simpo = next((tmp_path / "runs").glob("simpo-*")) / "metrics.jsonl"
    assert "nll_loss" not in simpo.read_text()  # plain SimPO, not CPO-SimPO
    held_out = [line["eval/rewards/accuracies"] for line in lines if "eval/loss" in line]
    assert len(held_out) == 3
    assert held_out[-1] >= 0.9

    # Without its recorded answers, the run answers again, and the same.
    recorded_lines = dpo.with_name("rollouts.jsonl").read_text().splitlines()
    answers = latest_answers([json.loads(line) for line in recorded_lines])
    dpo.with_name("rollouts.jsonl").write_text('{"torn')
    assert main([str(dpo.parent), "--generate", "--out", str(tmp_path / "again.html")]) == 0
    assert "answering its held-out prompts" in capfd.readouterr().err
    again = (tmp_path / "again.html").read_text()
    shown = [f"{k}</td><td>{line['completions'][0]}</td>" in again for k, line in answers.items()]
    assert sum(shown) == 6
    assert len(shown) == 8
    kept = [json.loads(x) for x in dpo.with_name("rollouts.jsonl").read_text().splitlines()[1:]]
    assert {line["trained_at"] for line in kept} == {4}
    assert compare([dpo.parent]) == again


CHAT = (
    "{% for m in messages %}{{ 'w2 ' + m.content + ' w3 ' }}{% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)
GRADES = """
def grade(prompts, completions, answer, chosen, **kwargs):
    assert prompts[0] == [{"role": "user", "content": "w7 " + answer[0]}]
    assert chosen[0] == [{"role": "assistant", "content": answer[0]}]
    return [float(c[0]["content"].startswith(a)) for c, a in zip(completions, answer)]
"""


def test_rewards_of_grpo_score_the_answers_of_a_preference_run(tmp_path):
    model = write_model_folder(tmp_path / "m")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))

    def said(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": said("user", f"w7 w{i}"), "chosen": said("assistant", f"w{i}"),
         "rejected": said("assistant", "w63"), "answer": f"w{i}"}
        for i in range(9, 15)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(GRADES)
    flags = [f"--model.path={model}", f"--data.path={tmp_path / 'rows.jsonl'}"]
    flags += ["--model.dtype=float32", "--data.eval_rows=3", "--train.max_steps=1"]
    flags += ["--eval.generate=true", "--eval.max_completion_length=4"]
    _, folder = read_command_line(PreferenceRun, [*flags, f"--run.dir={tmp_path / 'runs'}"], "")
    run = assemble_offline(folder, "preference")
    while not run.trainer.done:
        run.trainer.advance()
    page = compare([folder], judge=Judge(f"{tmp_path}/r.py:grade"))
    right = [
        line["completions"][0].startswith(line["columns"]["answer"])
        for line in latest_answers(parse_lines((folder / "rollouts.jsonl").read_bytes())).values()
    ]
    assert f"<td>{sum(right) / 3:.4g} over 3</td>" in page
    # The dataset's chosen answers are right, so that the run's wrong ones lose against them.
    assert f"(0 won, {sum(right)} tied, {3 - sum(right)} lost)" in page
    assert re.search(r"<td>user: w7 (w\d+)</td>.*?<td>\1\n\[score 1\]</td></tr>", page, re.DOTALL)


def test_mlx_is_not_loaded_before_openblas():
    code = "import launch.compare, sys; print('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
