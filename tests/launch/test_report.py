"""The report: whole from partial records, escaped, and without references to the network."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import report
from launch.charts import line_chart
from launch.report import write_report

EVIL = "<script>alert(1)</script>"


def group(step: int, text: str) -> str:
    return json.dumps({
        "kind": "train", "trained_at": step, "prompt": [{"role": "user", "content": EVIL}],
        "completions": [text], "rewards": [[1.0, None]], "reward_names": ["f", "g"],
    })  # fmt: skip


def test_report_is_whole_escaped_and_self_contained(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.25, "actors/a<b>/tokens_per_s": 5}\n[1]\nbroken\n'
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
    assert "Staleness" not in page
    assert not re.search(r"(?:src|href)=|https?://|url\(|@import", page)


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
    assert isinstance(report.prompt_text(prompt), str)
