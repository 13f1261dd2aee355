"""Put finished runs side by side: `launch/compare.py RUN RUN … [--reward FUNCTION] [--out FILE]`.

Writes one HTML file without network references: curves of metrics.jsonl, held-out figures first,
best and last, win rates by a reward function on the answers to held-out prompts, and samples. The
answers are those in rollouts.jsonl (`eval.generate` in offline runs); with --generate, runs that
lack them answer their held-out prompts now. All text is escaped.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from launch.charts import line_chart
from launch.records import parse_lines
from launch.report import STYLE, points, prompt_text
from launch.win_rate import function_scores, latest_answers, recorded_scores, win_rate
from protocol.config import read_toml
from protocol.errors import ConfigError, PippinError

CURVES = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "reward",
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "eval/reward",
    "completions/mean_length",
    "eval/completions/mean_length",
    "entropy",
    "grad_norm",
)
HELD_OUT = {
    "eval/rewards/accuracies": max,
    "eval/rewards/margins": max,
    "eval/reward": max,
    "eval/loss": min,
}
SAMPLES = 6

Answers = Mapping[str, Mapping[str, Any]]


@dataclass
class Compared:
    """A finished run: what it recorded, its newest answers by prompt and their scores."""

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    answers: Answers = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """Return the method or loss, in words."""
        section = self.config.get("objective", {})
        kinds = section.get("loss_type", "SFT")
        method = section.get("method", kinds)
        return str(method)


def read_run(folder: Path) -> Compared:
    """Read a run folder; ConfigError where it is none."""
    if not (folder / "metrics.jsonl").is_file() or not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} holds no metrics.jsonl and config.toml: name run folders")
    path = folder.resolve()
    rollouts = path / "rollouts.jsonl"
    lines = parse_lines(rollouts.read_bytes()) if rollouts.is_file() else []
    metrics = parse_lines((path / "metrics.jsonl").read_bytes())
    run = Compared(path.name, path, read_toml(path / "config.toml"), metrics)
    run.answers = latest_answers(lines)
    return run


def compare(folders: Sequence[Path], *, reward: str = "", generate: bool = False) -> str:
    """Return the page that compares the runs in `folders`."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.parent.name}/{run.name}"
        if generate and not run.answers:
            from launch.answer import answer_held_out

            run.answers = latest_answers(answer_held_out(run.folder))
        if run.answers:
            recorded = recorded_scores(run.answers)
            run.scores = function_scores(reward, run.answers) if reward else recorded
    return render(runs, reward)


def render(runs: Sequence[Compared], reward: str = "") -> str:
    """Return the page: curves, held-out table, win rates, samples, what the runs differ in."""
    title = " against ".join(run.name for run in runs)
    charts = [
        line_chart(key, {run.name: points(run.metrics, key) for run in runs}) for key in CURVES
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f"<h2>Held-out rows</h2>{_held_out(runs)}"
        f"<h2>Win rates{escape(f' by {reward}' if reward else '')}</h2>{_wins(runs)}"
        f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'
        f"<h2>Sample answers</h2>{_samples(runs)}"
        f"<h2>Settings that differ</h2>{_settings(runs)}</body></html>\n"
    )


def _held_out(runs: Sequence[Compared]) -> str:
    keys = [key for key in HELD_OUT if any(points(run.metrics, key) for run in runs)]
    if not keys:
        return "<p>No run has held-out figures: set data.eval_rows or data.eval_path.</p>"
    head = [f"{key}: first, best (step), last" for key in keys]
    rows: list[list[str]] = []
    for run in runs:
        cells = [run.name, run.objective]
        for key in keys:
            found = points(run.metrics, key)
            if not found:
                cells.append("none")
                continue
            step, best = HELD_OUT[key](found, key=lambda point: point[1])
            cells.append(f"{found[0][1]:.4f}, {best:.4f} ({step:g}), {found[-1][1]:.4f}")
        rows.append(cells)
    return _table(["run", "objective", *head], rows)


def _wins(runs: Sequence[Compared]) -> str:
    scored = [run for run in runs if run.scores]
    if len(scored) < 2:
        return (
            "<p>Fewer than two runs have scored answers: give --reward FUNCTION, and run with "
            "eval.generate = true or give --generate.</p>"
        )
    rows: list[list[str]] = []
    for run in scored:
        mean = sum(run.scores.values()) / len(run.scores)
        cells = [run.name, f"{mean:.4g} over {len(run.scores)}"]
        for other in scored:
            result = win_rate(run.scores, other.scores)
            counts = f"{result.wins} won, {result.ties} tied, {result.losses} lost"
            text = f"{result.rate:.3f} ± {result.error:.3f} ({counts})"
            cells.append("" if other is run else text)
        rows.append(cells)
    note = "<p>Row against column; a tie is half a win; ± is one standard error over prompts.</p>"
    return note + _table(["run", "mean score", *(run.name for run in scored)], rows)


def _samples(runs: Sequence[Compared]) -> str:
    answered = [run for run in runs if run.answers]
    if not answered:
        return "<p>No run has answers to held-out prompts.</p>"
    common = [key for key in answered[0].answers if all(key in run.answers for run in answered)]
    rows: list[list[str]] = []
    for key in common[:SAMPLES]:
        cells = [prompt_text(answered[0].answers[key].get("prompt"))]
        for run in answered:
            score = run.scores.get(key)
            worth = "" if score is None else f"\n[score {score:.4g}]"
            cells.append(f"{run.answers[key]['completions'][0]}{worth}")
        rows.append(cells)
    return _table(["prompt", *(run.name for run in answered)], rows)


def _settings(runs: Sequence[Compared]) -> str:
    flat = [_flat(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    rows = [
        [key, *(str(settings.get(key, "")) for settings in flat)]
        for key in keys
        if len({repr(settings.get(key)) for settings in flat}) > 1
    ]
    return _table(["setting", *(run.name for run in runs)], rows)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def main(argv: list[str] | None = None) -> int:
    """Write the comparison of the runs on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--reward", default="", help="file.py:function or package.module:function")
    parser.add_argument("--generate", action="store_true", help="answer held-out prompts now")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"))
    args = parser.parse_args(argv)
    try:
        page = compare(args.runs, reward=args.reward, generate=args.generate)
    except PippinError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(args.out)
    sys.stdout.write(f"{args.out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
