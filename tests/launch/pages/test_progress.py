"""The display: one line a step without a terminal, partial lines waited for, time left."""

import io
from pathlib import Path

import pytest

from launch.pages.followers import Follower, Sink
from launch.pages.progress import Progress, duration, sparkline
from protocol.run_record import (
    CheckpointFailed,
    CheckpointSaved,
    EvaluationFinished,
    EvaluationStarted,
    Notice,
    RunRecord,
    StartUp,
    record_event,
    write_run,
)


def announce(folder: Path, total_steps: int | None) -> None:
    """Write what the learner writes once it knows how many steps there are."""
    write_run(folder, RunRecord(program="sft", total_steps=total_steps))


def test_sparkline_spans_least_to_greatest_and_averages_long_series():
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([0.0, 2.0, 7.0]) == "▁▃█"
    assert sparkline([3.0]) == "▁"
    assert sparkline([0.0, 0.0, 7.0, 7.0], width=2) == "▁█"
    assert sparkline([]) == ""


def test_duration():
    assert duration(61.2) == "1:01"
    assert duration(3_661) == "1:01:01"


def test_one_line_a_step_and_partial_or_broken_lines_wait_or_are_left_out(tmp_path: Path):
    out = io.StringIO()
    metrics = tmp_path / "metrics.jsonl"
    with Progress(tmp_path, max_steps=4, out=out) as progress:
        metrics.write_text('{"step": 1, "time_s": 10, "reward": 0.25}\nnot json\n{"step": 2, "ti')
        progress.update()
        assert progress.time_left() is None
        with metrics.open("a") as file:
            file.write('me_s": 15.0, "reward": 0.5, "actors/a/tokens_per_s": 123.4}\n')
        progress.update()
        assert progress.time_left() == 10.0
    lines = out.getvalue().splitlines()
    assert lines[1:] == [
        "step 1/4  reward 0.25",
        "step 2/4  reward 0.5  actors/a/tokens_per_s 123.4  left 0:10",
    ]


def test_an_evaluation_after_later_steps_does_not_set_the_display_back(tmp_path: Path):
    out = io.StringIO()
    metrics = tmp_path / "metrics.jsonl"
    with Progress(tmp_path, max_steps=5, out=out) as progress:
        metrics.write_text(
            '{"step": 1, "time_s": 10, "loss": 1}\n{"step": 3, "time_s": 20, "loss": 1}\n'
        )
        progress.update()
        with metrics.open("a") as file:
            file.write('{"step": 2, "time_s": 60, "eval/reward": 0.5}\n')
        progress.update()
    assert out.getvalue().splitlines()[-1] == "step 2/5  eval/reward 0.5  left 0:10"


def test_offline_lines_show_held_out_figures_and_the_time_of_a_step(tmp_path: Path):
    out = io.StringIO()
    metrics = tmp_path / "metrics.jsonl"
    with Progress(tmp_path, max_steps=2, out=out) as progress:
        metrics.write_text(
            '{"step": 0, "eval/loss": 0.7, "eval/rewards/accuracies": 0.5, '
            '"eval/rewards/margins": 0.01}\n'
            '{"step": 1, "loss": 0.6, "rewards/margins": -0.25, "step_time": 1.23456, '
            '"memory/peak_gb": 9.04, "actors/memory_peak_gb": 4.2}\n'
        )
        progress.update()
    assert out.getvalue().splitlines()[1:] == [
        "step 0/2  eval/loss 0.7  eval/rewards/accuracies 0.5  eval/rewards/margins 0.01",
        "step 1/2  loss 0.6  rewards/margins -0.25  step_time 1.235 s  "
        "memory/peak_gb 9.04 GB  actors/memory_peak_gb 4.2 GB",
    ]


def test_the_learner_says_how_many_steps_there_are_and_its_notices_are_shown(tmp_path: Path):
    out = io.StringIO()
    announce(tmp_path, None)
    record_event(tmp_path, Notice(level="info", message="of an earlier learner"))
    with Progress(tmp_path, out=out) as progress:
        message = "rows.jsonl: 8 rows kept, 0 dropped, 0 truncated"
        record_event(tmp_path, Notice(level="info", message=message))
        record_event(tmp_path, StartUp(process="a", parts={"model": 1.25, "first tokens": 2.0}))
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 2.0, "loss": 1.5}\n')
        progress.update()
        announce(tmp_path, 4)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "time_s": 5.0, "loss": 1.25}\n')
    assert out.getvalue().splitlines()[1:] == [
        "rows.jsonl: 8 rows kept, 0 dropped, 0 truncated",
        "a: first tokens after 3.2 s (model 1.2, first tokens 2.0)",
        "step 1  loss 1.5",
        "step 2/4  loss 1.25  left 0:06",
    ]


def test_lines_that_a_resume_leaves_in_their_place_are_not_shown_again(tmp_path: Path):
    out = io.StringIO()
    metrics, fresh = tmp_path / "metrics.jsonl", tmp_path / "fresh"
    old = [f'{{"step": {step}, "time_s": {step}, "loss": {step}.5}}\n' for step in (1, 2, 3)]
    metrics.write_text("".join(old))
    with Progress(tmp_path, max_steps=3, out=out) as progress:
        progress.update()
        fresh.write_text(old[0] + '{"step": 2, "time_s": 9, "loss": 7.5}\n')
        fresh.replace(metrics)
        progress.update()
        with metrics.open("a") as file:
            file.write('{"step": 3, "time_s": 10, "loss": 6.5}\n')
    assert out.getvalue().splitlines()[1:] == ["step 2/3  loss 7.5", "step 3/3  loss 6.5"]


def test_an_evaluation_that_takes_its_time_is_shown_and_no_time_is_left_after_the_last_step(
    tmp_path: Path,
):
    out = io.StringIO()
    metrics = tmp_path / "metrics.jsonl"
    with Progress(tmp_path, max_steps=2, out=out) as progress:
        # The first evaluation is over before anyone looks; the last one is looked at twice.
        record_event(tmp_path, EvaluationStarted(step=0))
        record_event(tmp_path, EvaluationFinished(step=0))
        metrics.write_text(
            '{"step": 0, "time_s": 1.0, "eval/loss": 0.7}\n'
            '{"step": 1, "time_s": 2.0, "loss": 0.6}\n'
        )
        progress.update()
        assert progress.time_left() == 1.0
        record_event(tmp_path, EvaluationStarted(step=2))
        with metrics.open("a") as file:
            file.write('{"step": 2, "time_s": 3.0, "loss": 0.5}\n')
        progress.update()
        progress.update()
        record_event(tmp_path, EvaluationFinished(step=2))
        with metrics.open("a") as file:
            file.write('{"step": 2, "time_s": 63.0, "eval/loss": 0.4}\n')
    assert out.getvalue().splitlines()[1:] == [
        "step 0/2  eval/loss 0.7",
        "step 1/2  loss 0.6  left 0:01",
        "step 2/2  loss 0.5",
        "evaluating step 2",
        "step 2/2  eval/loss 0.4",
    ]


def test_a_checkpoint_that_failed_is_shown_once_and_that_saving_works_again(tmp_path: Path):
    out = io.StringIO()
    with Progress(tmp_path, max_steps=9, out=out) as progress:
        record_event(tmp_path, CheckpointFailed(step=3, reason="the disk is full"))
        progress.update()
        progress.update()
        record_event(tmp_path, CheckpointSaved(step=6, path="checkpoints/step-000006", again=True))
        record_event(tmp_path, CheckpointSaved(step=9, path="checkpoints/step-000009"))
    assert out.getvalue().splitlines()[1:] == [
        "step 3: training goes on without this checkpoint: the disk is full",
        "saving works again: saved checkpoints/step-000006",
    ]


def test_a_damaged_run_json_does_not_stop_the_display(tmp_path: Path):
    (tmp_path / "run.json").write_text("")
    out = io.StringIO()
    with Progress(tmp_path, out=out):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert out.getvalue().splitlines()[1:] == ["step 1  loss 0.5"]


def test_a_sink_is_given_each_line_and_event_once_in_order(tmp_path: Path):
    seen: list[object] = []

    class Recorder(Follower):
        def on_metrics(self, line: dict[str, object]) -> None:
            seen.append(line["step"])

        def on_event(self, event: object) -> None:
            seen.append(event)

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n')  # of an earlier learner
    with Recorder(tmp_path) as sink, metrics.open("a") as file:
        file.write('{"step": 2}\n{"step"')
        file.flush()
        event = EvaluationStarted(step=2, time=1.0)
        record_event(tmp_path, event)
        sink.update()
        file.write(": 3}\n")
    assert seen == [event, 2, 3]


def test_a_sink_that_raises_stops_and_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Tracker(Sink):
        def on_metrics(self, line: dict[str, object]) -> None:
            raise OSError("no network")

    metrics = tmp_path / "metrics.jsonl"
    metrics.touch()
    with Tracker(tmp_path) as tracker, metrics.open("a") as file:
        for step in (1, 2):
            print(f'{{"step": {step}}}', file=file, flush=True)
            tracker.update()
    said = capsys.readouterr().err
    assert said == "Tracker stopped, the run goes on: OSError('no network')\n"


class Terminal(io.StringIO):
    """A terminal for rich."""

    def isatty(self) -> bool:
        return True


def panel(out: Terminal) -> list[list[str]]:
    """Return the words of each line of the panel as it was drawn last."""
    text = out.getvalue()
    return [line.strip("│ ").split() for line in text[text.rindex("╭") :].splitlines()]


def test_the_panel_of_a_preference_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")
    out = Terminal()
    with Progress(tmp_path, out=out) as progress:
        announce(tmp_path, 8)
        (tmp_path / "metrics.jsonl").write_text(
            '{"step": 0, "time_s": 1.0, "eval/loss": 0.69, "eval/rewards/accuracies": 0.0}\n'
            '{"step": 1, "time_s": 2.0, "loss": 0.75, "rewards/margins": 0.5}\n'
            '{"step": 2, "time_s": 4.0, "loss": 0.25, "rewards/margins": 1.5}\n'
        )
        progress.update()
        record_event(tmp_path, EvaluationStarted(step=2))
        progress.update()
        assert ["time", "left", "0:09,", "evaluating", "step", "2"] in panel(out)
        record_event(tmp_path, EvaluationFinished(step=2))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "time_s": 4.0, "eval/rewards/accuracies": 1.0}\n')
    rows = panel(out)  # and the evaluation is over
    assert ["step", "2", "of", "8"] in rows
    assert ["loss", "█▁", "0.25"] in rows
    assert ["eval/rewards/accuracies", "▁█", "1"] in rows
    assert ["rewards/margins", "1.5"] in rows
    assert ["time", "left", "0:09"] in rows
