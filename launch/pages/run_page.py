"""The report of a run: RUN/report.html, one file that needs no network.

It shows what the run is (run.json), curves (metrics.jsonl), what went wrong (events.jsonl) and
sample completions with their rewards, first and last (rollouts.jsonl). Whatever is missing or
damaged in those files is left out. All text is escaped.
"""

from html import escape
from pathlib import Path
from typing import Any, cast

from launch.pages.charts import line_chart
from launch.pages.html import page, points, prompt_text, table
from launch.run_folder.tail import number, parse_lines
from protocol.errors import ConfigError
from protocol.run_record import (
    EVENTS,
    RUN,
    CheckpointFailed,
    CheckpointSaved,
    Fault,
    Restart,
    StartUp,
    parse_events,
    read_run,
    replace_file,
)

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
    "Memory of the learner, GB": ("memory/active_gb", "memory/peak_gb", "memory/cache_gb"),
    "Memory of all actors, GB": (
        "actors/memory_active_gb",
        "actors/memory_peak_gb",
        "actors/memory_cache_gb",
    ),
}
SUMMARY = (
    "reward",
    "eval/reward",
    "loss",
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
)


def write_report(folder: Path) -> Path:
    """Write the report of a run folder and return its path."""
    metrics = parse_lines(_bytes(folder / "metrics.jsonl"))
    rates = sorted({key for line in metrics for key in line if key.endswith("tokens_per_s")})
    charts = [
        line_chart(title, {key: points(metrics, key) for key in keys})
        for title, keys in {**CHARTS, "Throughput, tokens/s": tuple(rates)}.items()
    ]
    shown = "".join(charts) or "<p>No metrics were written.</p>"
    config = _bytes(folder / "config.toml").decode("utf-8", errors="replace")
    text = page(
        folder.name,
        f"{_about(folder)}{_start(folder)}{_troubles(folder)}{_summary(metrics)}"
        f'<div class="charts">{shown}</div>{_samples(folder)}'
        f"<h2>Configuration</h2><pre>{escape(config)}</pre>",
    )

    # Replaced as a whole: the page may be open in a browser.
    target = folder / "report.html"
    replace_file(target, text.encode(errors="replace"))
    return target


def _about(folder: Path) -> str:
    """Return a line on what ran, with which versions, and how it ended."""
    if not (folder / RUN).exists():
        return ""

    try:
        record = read_run(folder)
    except ConfigError as error:  # the other files have the curves
        return f"<p>{escape(str(error))}</p>"

    steps = f" of {record.total_steps} steps" if record.total_steps is not None else ""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    state = record.state.replace("_", " ")
    return f"<p>{escape(f'{record.program} run{steps}, {state}; {versions}')}</p>"


def _start(folder: Path) -> str:
    """Return how long each process took to its first result, and in which stages."""
    events = parse_events(_bytes(folder / EVENTS))
    found = [escape(each.text) for each in events if isinstance(each, StartUp)]
    return f"<p>{'<br>'.join(found)}</p>" if found else ""


def _troubles(folder: Path) -> str:
    """Return what went wrong, in order, and that saving works again where it does."""
    items = ""
    for event in parse_events(_bytes(folder / EVENTS)):
        match event:
            case CheckpointFailed() | CheckpointSaved(again=True) | Fault() | Restart():
                items += f"<li>{escape(event.text)}</li>"
            case _:
                pass
    return f"<h2>Faults</h2><ul>{items}</ul>" if items else ""


def _summary(metrics: list[dict[str, Any]]) -> str:
    parts: list[str] = []
    for key in SUMMARY:
        found = points(metrics, key)
        if found:
            parts.append(f"{escape(key)}: {found[0][1]:.4g} first, {found[-1][1]:.4g} last")
    return f"<p>{'; '.join(parts)}</p>"


def _samples(folder: Path) -> str:
    rollouts = parse_lines(_bytes(folder / "rollouts.jsonl"))
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
    if not groups:
        return ""

    rows: list[tuple[str, str, str]] = []
    for line in groups:
        rewards = _list(line, "rewards")
        names = _list(line, "reward_names")
        for index, text in enumerate(_list(line, "completions")[:SAMPLES]):
            reward: object = rewards[index] if index < len(rewards) else []
            values = cast("list[object]", reward) if isinstance(reward, list) else [reward]
            labels = [*map(str, names), *[""] * len(values)]
            worth = "\n".join(f"{n} {v}" for n, v in zip(labels, values, strict=False))
            rows.append((prompt_text(line.get("prompt")), str(text), worth))
    return f"<h2>{escape(title)}</h2>{table(('prompt', 'completion', 'rewards'), rows)}"


def _list(line: dict[str, Any], key: str) -> list[Any]:
    value = line.get(key)
    return cast("list[Any]", value) if isinstance(value, list) else []


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
