"""`launch/report.py RUN`: writes RUN/report.html, one file without network references.

Curves from metrics.jsonl and sample completions with their rewards, first against last, from
rollouts.jsonl. What is missing or broken in those files is left out. All text is escaped.
"""

import os
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from launch.pages.charts import Points, line_chart
from launch.run_folder.tail import number, parse_lines

SAMPLES = 4
CHARTS: dict[str, tuple[str, ...]] = {
    "Reward": ("reward", "reward_std"),
    "Evaluation": ("eval/reward", "eval/accuracy"),
    "Loss": ("loss", "eval/loss"),
    "Preference accuracy": ("rewards/accuracies", "eval/rewards/accuracies"),
    "Preference margins": ("rewards/margins", "eval/rewards/margins"),
    "Log-probs of held-out answers, nats": ("eval/logps/chosen", "eval/logps/rejected"),
    "Completion length": ("completions/mean_length", "completions/max_length"),
    "Staleness": ("staleness/mean", "staleness/max"),
    "KL and entropy": ("kl", "entropy"),
    "Gradient norm": ("grad_norm",),
    "Time of a step, s": ("step_time",),
}
SUMMARY = (
    "reward",
    "eval/reward",
    "loss",
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
)
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1000px;padding:0 1rem;
color:#111;background:#fff}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1rem}
figure{margin:0}figcaption{font-weight:600}figcaption span{font-weight:400;margin-left:.6em}
svg{width:100%;height:auto}svg text{font-size:11px;fill:#555}.grid{stroke:#e5e7eb}
polyline{stroke-width:1.6}
table{border-collapse:collapse;width:100%;table-layout:fixed}
td,th{border:1px solid #ddd;padding:.4em;vertical-align:top;text-align:left;
white-space:pre-wrap;overflow-wrap:anywhere}
"""


def write_report(folder: Path) -> Path:
    """Write the report of a run folder and return its path."""
    metrics = parse_lines(_bytes(folder / "metrics.jsonl"))
    rollouts = parse_lines(_bytes(folder / "rollouts.jsonl"))
    config = _bytes(folder / "config.toml").decode("utf-8", errors="replace")
    target = folder / "report.html"
    temporary = folder / f".report-{os.getpid()}.html"
    page = render(folder.name, metrics, rollouts, config)
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(target)
    return target


def render(
    name: str, metrics: list[dict[str, Any]], rollouts: list[dict[str, Any]], config: str
) -> str:
    """Return the page."""
    rates = sorted({key for line in metrics for key in line if key.endswith("tokens_per_s")})
    charts = [
        line_chart(title, {key: points(metrics, key) for key in keys})
        for title, keys in {**CHARTS, "Throughput, tokens/s": tuple(rates)}.items()
    ]
    shown = "".join(charts) or "<p>No metrics were written.</p>"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(name)}</h1>{_summary(metrics)}"
        f'<div class="charts">{shown}</div>{_samples(rollouts)}'
        f"<h2>Configuration</h2><pre>{escape(config)}</pre></body></html>\n"
    )


def points(metrics: list[dict[str, Any]], key: str) -> Points:
    """Return the (step, value) points of a metric."""
    pairs = [(number(line, "step"), number(line, key)) for line in metrics]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _summary(metrics: list[dict[str, Any]]) -> str:
    parts: list[str] = []
    for key in SUMMARY:
        found = points(metrics, key)
        if found:
            parts.append(f"{escape(key)}: {found[0][1]:.4g} first, {found[-1][1]:.4g} last")
    return f"<p>{'; '.join(parts)}</p>"


def _samples(rollouts: list[dict[str, Any]]) -> str:
    groups = [line for line in rollouts if _list(line, "completions")]
    train = [line for line in groups if line.get("kind") != "eval"]
    held_out = [line for line in groups if line.get("kind") == "eval"]
    versions = sorted({number(line, "trained_at") or 0.0 for line in held_out})
    parts = [_titled("Samples: first", train[:SAMPLES])]
    parts.append(_titled("Samples: last", train[SAMPLES:][-SAMPLES:]))
    for version in dict.fromkeys([*versions[:1], *versions[-1:]]):
        lines = [line for line in held_out if (number(line, "trained_at") or 0.0) == version]
        parts.append(_titled(f"Held-out answers at step {version:g}", lines[:SAMPLES]))
    return "".join(parts)


def _titled(title: str, groups: list[dict[str, Any]]) -> str:
    return f"<h2>{escape(title)}</h2>{_table(groups)}" if groups else ""


def _table(groups: list[dict[str, Any]]) -> str:
    rows = ["<tr><th>prompt</th><th>completion</th><th>rewards</th></tr>"]
    for line in groups:
        rewards = _list(line, "rewards")
        names = _list(line, "reward_names")
        for index, text in enumerate(_list(line, "completions")[:SAMPLES]):
            row = rewards[index] if index < len(rewards) else []
            values = row if isinstance(row, list) else [row]
            labels = [*map(str, names), *[""] * len(values)]
            worth = "\n".join(f"{n} {v}" for n, v in zip(labels, values, strict=False))
            prompt = prompt_text(line.get("prompt"))
            cells = "".join(f"<td>{escape(part)}</td>" for part in (prompt, str(text), worth))
            rows.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def prompt_text(prompt: object) -> str:
    """Return a prompt, a string or a list of messages, as text."""
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
    return prompt if isinstance(prompt, str) else msgspec.json.encode(prompt).decode()


def _list(line: dict[str, Any], key: str) -> list[Any]:
    value = line.get(key)
    return value if isinstance(value, list) else []


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
