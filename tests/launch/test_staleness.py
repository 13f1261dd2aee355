"""Staleness recomputed from a run folder; figures by hand."""

import json

import pytest

from launch.staleness import main, measure

ROLLOUTS = [
    {"policy_spans": [[{"start": 0, "version": 3}, {"start": 4, "version": 4}], [{"version": 5}]],
     "trained_at": 5, "started_at": 0.0, "finished_at": 4.0},
    {"policy_spans": [[{"start": 0, "version": 6}]],
     "trained_at": 6, "started_at": 3.0, "finished_at": 6.0},
    {"kind": "eval", "policy_spans": [[{"version": 0}]], "trained_at": 9},
]  # fmt: skip
METRICS = [
    {"train_started_at": 2.0, "train_finished_at": 5.0},
    {"train_started_at": 5.5, "train_finished_at": 8.0},
    {"eval_reward": 1.0},
]


def test_ages_and_overlap_by_hand():
    seen = measure(ROLLOUTS, METRICS)
    assert (seen.groups, seen.spans, seen.max, seen.mean) == (2, 4, 2, 0.75)
    assert (seen.sampling_s, seen.training_s, seen.overlap_s) == (6.0, 5.5, 3.5)


@pytest.mark.parametrize(
    ("eta", "flags", "status"), [(2, [], 0), (1, [], 1), (1, ["--max", "2"], 0)]
)
def test_the_exit_status_says_whether_the_bound_held(tmp_path, capsys, eta, flags, status):
    (tmp_path / "config.toml").write_text(f"[queue]\nmax_staleness = {eta}\n")
    for name, lines in (("rollouts", ROLLOUTS), ("metrics", METRICS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert main([str(tmp_path), *flags]) == status
    assert "staleness max 2, mean 0.750" in capsys.readouterr().out


def test_a_folder_without_records_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "config.toml cannot be read" in capsys.readouterr().err
