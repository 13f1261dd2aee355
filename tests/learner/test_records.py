"""What a run writes as it goes."""

import json

from learner.records import Records, mend


def test_lines_are_appended_whole_and_what_is_not_finite_is_null(tmp_path):
    records = Records(tmp_path / "run", started_at=0.0)
    records.metrics(1, {"loss": 0.5, "kl": float("nan")})
    records.metrics(2, {"loss": float("inf")})
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, None)]
    assert lines[0]["kl"] is None
    assert lines[0]["time_s"] > 0


def test_a_line_that_a_killed_writer_left_is_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"st')
    Records(tmp_path, started_at=0.0).metrics(2, {})
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1, 2]
    whole = tmp_path / "whole.jsonl"
    whole.write_text('{"step":1}\n')
    mend(whole)
    assert whole.read_text() == '{"step":1}\n'
    mend(tmp_path / "absent")
