"""The report: whole from partial records, escaped, and without references to the network."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import report
from launch.pages.charts import line_chart, ticks
from launch.pages.html import prompt_text
from launch.pages.run_page import write_report
from protocol.run_record import (
    CheckpointFailed,
    CheckpointSaved,
    Notice,
    Restart,
    RunRecord,
    StartUp,
    record_event,
    write_run,
)

EVIL = "<script>alert(1)</script>"


def group(step: int, text: str, kind: str = "train") -> str:
    return json.dumps({
        "kind": kind, "trained_at": step, "prompt": [{"role": "user", "content": EVIL}],
        "completions": [text], "rewards": [[1.0, None]], "reward_names": ["f", "g"],
    })  # fmt: skip


def test_report_is_whole_escaped_and_self_contained(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.25, "actors/a<b>/tokens_per_s": 5, '
        '"memory/peak_gb": 9.5}\n[1]\nbroken\n'
        '{"step": 2, "reward": 0.75, "eval/reward": null, "kl": "x"}\n{"step": 3, "rew'
    )
    lines = [group(i, f"answer {i} & <b>") for i in range(9)]
    (tmp_path / "rollouts.jsonl").write_text("\n".join([*lines, '{"completions": 3}', "{"]) + "\n")
    page = write_report(tmp_path).read_text()
    assert "reward: 0.25 first, 0.75 last" in page
    assert EVIL not in page
    assert "<b>" not in page
    assert "answer 0 &amp; &lt;b&gt;" in page
    assert "answer 8 &amp;" in page
    assert "answer 4 &amp;" not in page
    assert "f 1.0\ng None" in page
    assert "Throughput" in page
    assert "memory/peak_gb 9.5" in page
    assert "Memory of all actors" not in page
    assert "Staleness" not in page
    assert not re.search(r"(?:src|href)=|https?://|url\(|@import", page)


def test_held_out_answers_are_shown_first_and_last(tmp_path: Path):
    lines = [group(step, f"answer {i} at {step}", "eval") for step in (0, 5, 9) for i in range(6)]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(tmp_path).read_text()
    assert "Samples" not in page
    assert page.index("Held-out answers at step 0") < page.index("answer 0 at 0")
    assert page.index("answer 3 at 0") < page.index("Held-out answers at step 9")
    assert "answer 3 at 9" in page
    assert "answer 4 at" not in page
    assert "at 5" not in page


def test_the_page_says_what_ran_how_it_ended_and_what_went_wrong(tmp_path: Path):
    versions = {"mlx": "0.32.0", "mlx-lm": "0.32.1"}
    record = RunRecord(program="grpo", state="stopped", total_steps=9, versions=versions)
    write_run(tmp_path, record)
    record_event(tmp_path, Notice(level="info", message="seven rows"))
    record_event(tmp_path, StartUp(process="a", parts={"model": 1.5, "first tokens": 2.0}))
    record_event(tmp_path, StartUp(process="<b>", parts={"model": 1.0, "first step": 3.0}))
    record_event(tmp_path, CheckpointSaved(step=2, path="checkpoints/step-000002"))
    record_event(tmp_path, CheckpointFailed(step=4, reason="<full>"))
    record_event(tmp_path, CheckpointSaved(step=6, path="checkpoints/step-000006", again=True))
    record_event(
        tmp_path,
        Restart(process="actor-1", reason="SIGKILL", attempt=1, max_restarts=3, delay_s=0.5),
    )
    page = write_report(tmp_path).read_text()
    assert "<p>grpo run of 9 steps, stopped; mlx 0.32.0, mlx-lm 0.32.1</p>" in page
    assert (
        "<ul><li>step 4: training goes on without this checkpoint: &lt;full&gt;</li>"
        "<li>saving works again: saved checkpoints/step-000006</li>"
        "<li>actor-1 ended with SIGKILL; restart 1 of 3 in 0.5 s</li></ul>"
    ) in page
    assert (
        "<p>a: first tokens after 3.5 s (model 1.5, first tokens 2.0)<br>"
        "&lt;b&gt;: first step after 4.0 s (model 1.0, first step 3.0)</p>"
    ) in page
    assert "seven rows" not in page


def test_ticks_are_round_and_within():
    assert ticks(0.6466, 0.6936) == [0.65, 0.66, 0.67, 0.68, 0.69]
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3.0, 1.0) == [-3.0, -2.0, -1.0, 0.0, 1.0]
    assert ticks(0.0, 4e-6) == [0.0, 1e-6, 2e-6, 3e-6, 4e-6]
    assert ticks(0.0, 20.0, whole=True) == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert ticks(0.0, 2.0, whole=True) == [0.0, 1.0, 2.0]
    chart = line_chart("t", {"a": [(0.0, 0.0), (10.0, 2.0)]})
    assert '<line x1="58" x2="448" y1="101.0" y2="101.0" class="grid"/>' in chart  # the value 1
    assert '<text x="448.0" y="204" text-anchor="middle">10</text>' in chart


def test_points_are_placed_on_the_axes():
    chart = line_chart("t", {"a": [(0.0, 0.0), (10.0, 2.0)]})
    assert 'points="58.0,190.0 448.0,12.0"' in chart
    assert line_chart("t", {"a": []}) == ""


def test_an_empty_run_gives_a_page_and_a_missing_one_an_error(tmp_path: Path):
    assert "No metrics were written" in write_report(tmp_path).read_text()
    command = [sys.executable, report.__file__, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "required a run folder" in done.stderr


@pytest.mark.parametrize("prompt", ["plain", None, [{"role": "user"}, 3]])
def test_any_prompt_has_a_text(prompt: object):
    assert isinstance(prompt_text(prompt), str)


@pytest.mark.parametrize("damaged", ["", '{"program": "gr', '{"state": "running"}', "[]"])
def test_a_damaged_run_json_is_named_and_the_rest_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
):
    (tmp_path / "run.json").write_text(damaged)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    assert report.main() == 0
    page = (tmp_path / "report.html").read_text()
    assert f"<p>{tmp_path}/run.json is damaged: " in page
    assert "loss: 0.5 first, 0.25 last" in page
