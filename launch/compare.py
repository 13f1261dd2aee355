"""Put finished runs side by side: `launch/compare.py RUN RUN … [--reward FUNCTION] [--out FILE]`.

Writes one HTML file that needs no network: held-out figures before and after training, win
rates by a reward function on the answers to held-out prompts, curves, samples, and the settings
that differ. The answers are those in rollouts.jsonl (offline runs need `eval.generate`); with
--generate, runs that lack them answer their held-out prompts now, and store the answers there.
Answers are compared with those of the other runs, with the same run's first ones, and with the
dataset's chosen ones.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from launch.pages.comparison import Answers, AnswerSet, FinishedRun, render
from launch.pages.judge import TIMEOUT_S, Judge
from launch.pages.win_rate import first_answers, latest_answers, recorded_scores
from launch.processes.blas import prepare_mlx
from launch.processes.exit_status import STOPPED
from launch.run_folder.tail import parse_lines
from protocol.config.load import read_toml
from protocol.errors import ConfigError, PippinError
from protocol.run_record import read_run

CHOSEN = "chosen answers"


def read_finished_run(folder: Path) -> FinishedRun:
    """Read a run folder; ConfigError if `folder` is not one."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} holds no metrics.jsonl and config.toml: give run folders")

    path = folder.resolve()
    rollouts = path / "rollouts.jsonl"
    lines = parse_lines(rollouts.read_bytes()) if rollouts.is_file() else []
    metrics = parse_lines((path / "metrics.jsonl").read_bytes())
    newest = AnswerSet(path.name, latest_answers(lines))
    before = AnswerSet(f"{path.name} before", first_answers(lines))
    config = read_toml(path / "config.toml")
    return FinishedRun(path.name, path, read_run(path).program, config, metrics, newest, before)


def compare(folders: Sequence[Path], *, judge: Judge | None = None, generate: bool = False) -> str:
    """Return the page that compares the runs; without a judge, by the rewards they recorded."""
    runs = _with_distinct_names([read_finished_run(folder) for folder in folders])
    for run in runs:
        if generate and not run.newest.answers:
            run.newest = replace(run.newest, answers=_answered(run))

    chosen = _chosen(runs)
    sets = [*(run.newest for run in runs), *(run.before for run in runs), chosen]
    if judge is None:
        for answer_set in sets:
            answer_set.scores = recorded_scores(answer_set.answers)
    elif any(answer_set.answers for answer_set in sets):
        scores = judge.scores({answer_set.name: answer_set.answers for answer_set in sets})
        for answer_set in sets:
            answer_set.scores = scores[answer_set.name]
    return render(runs, chosen, judge.function if judge else "")


def _answered(run: FinishedRun) -> Answers:
    """Return the answers of the finished policy to the run's held-out prompts."""
    for advice in prepare_mlx():
        sys.stderr.write(f"{advice}\n")
    from launch.pages.answers import answer_held_out  # MLX comes with it, after OpenBLAS

    sys.stderr.write(f"{run.name}: answering its held-out prompts\n")
    sys.stderr.flush()
    lines = answer_held_out(run.folder)
    _store(run.folder / "rollouts.jsonl", lines)
    return latest_answers(lines)


def _store(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add lines to a run's records, so that the next comparison finds them."""
    before = path.read_bytes() if path.is_file() else b""
    # A writer that was killed may have left half a line: ours must not be glued to it.
    partial = before != b"" and not before.endswith(b"\n")
    data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    try:
        with path.open("ab") as file:
            file.write(b"\n" * partial + data)
    except OSError as error:
        sys.stderr.write(f"the answers cannot be stored for the next comparison: {error}\n")


def _with_distinct_names(runs: list[FinishedRun]) -> list[FinishedRun]:
    """Prefix names that occur twice with the parent folder; number those that are still equal."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.rename(f"{run.folder.parent.name}/{run.name}")
    for index, run in enumerate(runs):
        if any(run.name == other.name for other in runs[:index]):
            run.rename(f"{run.name} ({index + 1})")
    return runs


def _chosen(runs: Sequence[FinishedRun]) -> AnswerSet:
    """Return the dataset's chosen answers to the prompts that the runs answered."""
    answers: Answers = {
        key: {**line, "completions": [chosen]}
        for run in runs
        for key, line in run.newest.answers.items()
        if (chosen := {**line.get("columns", {}), **line}.get("chosen"))
    }
    return AnswerSet(CHOSEN, answers)


def require_writable(out: Path, temporary: Path) -> None:
    """Raise ConfigError if the page cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error}; name another file") from error
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder; name a file, such as {out}/page.html")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--reward",
        default="",
        metavar="FUNCTION",
        help="file.py:function, package.module:function or zmq://host:port; called as in GRPO, "
        "with prompts, completions and every column of the held-out rows",
    )
    parser.add_argument(
        "--reward-timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="S",
        help="seconds to score the answers to one prompt (%(default)g)",
    )
    parser.add_argument("--keys", default="", metavar="DIR", help="for zmq:// servers elsewhere")
    parser.add_argument(
        "--generate",
        action="store_true",
        help="for runs without answers: answer held-out prompts now",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.html"), help="(%(default)s)", metavar="FILE"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the comparison of the runs on the command line."""
    args = arguments(argv)
    judge = Judge(args.reward, args.reward_timeout, args.keys) if args.reward else None
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}")

    # Checked first: scoring and generating may take an hour.
    try:
        require_writable(args.out, temporary)
        page = compare(args.runs, judge=judge, generate=args.generate)
    except PippinError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return STOPPED

    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(args.out)
    sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
