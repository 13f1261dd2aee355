"""The page of `launch/compare.py`: tables and charts of runs side by side. All text is escaped."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

from launch.pages.charts import Points, line_chart
from launch.pages.html import only_content, page, points, prompt_text, table
from launch.pages.progress import duration
from launch.pages.win_rate import win_rate
from protocol.run_record import Program

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
OWN_UNIT = ("loss", "rewards/margins")  # not comparable between objectives
Best = Callable[..., tuple[float, float]]
HELD_OUT: dict[str, Best] = {
    "eval/rewards/accuracies": max,
    "eval/rewards/margins": max,
    "eval/reward": max,
    "eval/loss": min,
}
SAMPLES = 6
TIES = (
    "An accuracy of 0 at step 0 is not an error: while the policy equals the reference, every "
    "implicit reward is 0, and a tie does not count as correct."
)
UNITS = "Losses and margins are in each objective's own unit: compare them within a run."

Answers = dict[str, dict[str, Any]]


@dataclass
class AnswerSet:
    """Answers by prompt, as lines of rollouts.jsonl, and their scores by prompt."""

    name: str
    answers: Answers
    scores: dict[str, float] = field(default_factory=dict[str, float])


@dataclass
class FinishedRun:
    """A run to compare: what it recorded, and its newest and first answers."""

    name: str
    folder: Path
    program: Program
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    newest: AnswerSet
    before: AnswerSet

    def rename(self, name: str) -> None:
        """Change the name, of the answers too."""
        self.name = self.newest.name = name
        self.before.name = f"{name} before"

    @property
    def objective(self) -> str:
        """Return the method, and its losses if they are not the usual one."""
        section: dict[str, Any] = self.config.get("objective", {})
        method = section.get("method", self.program)
        given: object = section.get("loss_type", [])
        losses = cast("list[object]", given) if isinstance(given, list) else [given]
        shown = method == "grpo" or (method == "dpo" and losses != ["sigmoid"])
        return f"{method} ({', '.join(map(str, losses))})" if shown and losses else str(method)


def render(runs: Sequence[FinishedRun], chosen: AnswerSet, reward: str = "") -> str:
    """Return the page: held-out table, win rates, curves, samples, cost, differing settings.

    `chosen` are the dataset's own answers; `reward` names the function that scored, "" for the
    runs' own rewards.
    """
    return page(
        " against ".join(run.name for run in runs),
        f"<h2>Held-out rows</h2>{_held_out(runs)}"
        f"<h2>Win rates{escape(f' by {reward}' if reward else '')}</h2>{_wins(runs, chosen)}"
        f'<h2>Curves</h2><div class="charts">{_charts(runs)}</div>'
        f"<h2>Sample answers</h2>{_samples(runs, chosen)}"
        f"<h2>Cost</h2>{_cost(runs)}"
        f"<h2>Settings that differ</h2>{_settings(runs)}",
    )


def _charts(runs: Sequence[FinishedRun]) -> str:
    """Return a chart per metric with a line per run, or a chart per run where units differ."""
    apart = set[str]()
    if len({run.objective for run in runs}) > 1:
        apart = {key for key in CURVES if key.removeprefix("eval/") in OWN_UNIT}
    charts = [
        line_chart(f"{key}, {run.name}", {k: points(run.metrics, k) for k in (key, f"eval/{key}")})
        for key in OWN_UNIT
        for run in runs
        if key in apart
    ]
    charts += [
        line_chart(key, {run.name: points(run.metrics, key) for run in runs})
        for key in CURVES
        if key not in apart
    ]
    return "".join(charts)


def _held_out(runs: Sequence[FinishedRun]) -> str:
    keys = [key for key in HELD_OUT if any(points(run.metrics, key) for run in runs)]
    if not keys:
        return "<p>No run has held-out figures: set data.eval_rows or data.eval_path.</p>"
    rows: list[list[str]] = []
    notes: list[str] = []
    for run in runs:
        cells = [run.name, run.objective]
        for key in keys:
            found = points(run.metrics, key)
            cells += _first_best_last(found, HELD_OUT[key])
            if key.endswith("accuracies") and list(found[:1]) == [(0.0, 0.0)]:
                notes = [TIES]
        rows.append(cells)

    if len({run.objective for run in runs}) > 1:
        notes.append(UNITS)
    counts = sorted({f"{value:g}" for run in runs for _, value in points(run.metrics, "eval/rows")})
    about = [f"{' and '.join(counts)} rows, never trained on; (step)."] if counts else []

    head = ["run", "objective", *["first", "best", "last"] * len(keys)]
    return f"<p>{escape(' '.join(about + notes))}</p>" + table(head, rows, over=("", "", *keys))


def _first_best_last(found: Points, best: Best) -> list[str]:
    if not found:
        return ["", "", ""]
    peak = best(found, key=itemgetter(1))
    return [f"{value:.4f} ({step:g})" for step, value in (found[0], peak, found[-1])]


def _wins(runs: Sequence[FinishedRun], chosen: AnswerSet) -> str:
    scored = [run for run in runs if run.newest.scores]
    started = any(run.before.scores for run in scored)
    if not scored or len(scored) + started + bool(chosen.scores) < 2:
        return (
            "<p>Fewer than two sets of answers have scores: give --reward FUNCTION, and run with "
            "eval.generate = true or give --generate.</p>"
        )

    rows: list[list[str]] = []
    for run in scored:
        mean = statistics.fmean(run.newest.scores.values())
        cells = [run.name, f"{mean:.4g} over {len(run.newest.scores)}"]
        cells += ["" if other is run else _win(run.newest, other.newest) for other in scored]
        cells += [_win(run.newest, run.before)] * started
        cells += [_win(run.newest, chosen)] * bool(chosen.scores)
        rows.append(cells)

    head = ["run", "mean score", *(run.name for run in scored)]
    head += ["its own first answers"] * started
    head += [f"the dataset's {chosen.name}"] * bool(chosen.scores)
    note = "<p>Row against column; a tie is half a win; ± is one standard error over prompts.</p>"
    return note + table(head, rows)


def _win(first: AnswerSet, second: AnswerSet) -> str:
    result = win_rate(first.scores, second.scores)
    if result.total == 0:
        return "no common prompt"
    counts = f"{result.wins} won, {result.ties} tied, {result.losses} lost"
    return f"{result.rate:.3f} ± {result.error:.3f} ({counts})"


def _samples(runs: Sequence[FinishedRun], chosen: AnswerSet) -> str:
    answered = [run for run in runs if run.newest.answers]
    if not answered:
        return "<p>No run has answers to held-out prompts.</p>"
    sets = [run.newest for run in answered]
    first = answered[0].before
    if all(_texts(run.before) == _texts(first) != {} for run in answered):
        sets.insert(0, AnswerSet("before training", first.answers, first.scores))
    sets += [chosen] * bool(chosen.answers)

    common = [k for k in sets[0].answers if all(k in answer_set.answers for answer_set in sets)]
    rows = [
        [
            prompt_text(sets[0].answers[key].get("prompt")),
            *(_answer(answer_set, key) for answer_set in sets),
        ]
        for key in common[:SAMPLES]
    ]
    return table(["prompt", *(answer_set.name for answer_set in sets)], rows)


def _texts(answer_set: AnswerSet) -> dict[str, str]:
    return {key: str(line["completions"][0]) for key, line in answer_set.answers.items()}


def _answer(answer_set: AnswerSet, key: str) -> str:
    score = answer_set.scores.get(key)
    worth = "" if score is None else f"\n[score {score:.4g}]"
    return f"{prompt_text(only_content(answer_set.answers[key]['completions'][0]))}{worth}"


def _cost(runs: Sequence[FinishedRun]) -> str:
    rows: list[list[str]] = []
    for run in runs:
        times = [seconds for _, seconds in points(run.metrics, "step_time")]
        tokens = [count for _, count in points(run.metrics, "num_tokens")]
        whole = [seconds for _, seconds in points(run.metrics, "time_s")]
        count = f"{tokens[-1]:,.0f}" if tokens else ""
        median = f"{statistics.median(times):.3g}" if times else ""
        rows.append(
            [run.name, str(len(times)), count, median, duration(whole[-1]) if whole else ""]
        )
    return table(["run", "steps", "tokens", "s/step, median", "time, with evaluations"], rows)


def _settings(runs: Sequence[FinishedRun]) -> str:
    flat = [_flat(run.config) for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    rows = [
        [key, *(str(settings.get(key, "")) for settings in flat)]
        for key in keys
        if len({repr(settings.get(key)) for settings in flat}) > 1
    ]
    return table(["setting", *(run.name for run in runs)], rows)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= _flat(cast("dict[str, Any]", value), f"{name}.")
        else:
            found[name] = value
    return found
