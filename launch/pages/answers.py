"""Answers of a finished offline run to its held-out prompts, for runs that recorded none."""

from pathlib import Path
from typing import Any

from msgspec import structs

from launch.run_folder.tail import number, parse_lines
from learner.build.offline import answering, open_examples
from protocol.config.load import load
from protocol.config.settings import PreferenceRun, SftRun
from protocol.errors import ConfigError
from protocol.model.policy import load_policy
from protocol.run_record import read_run


def answer_held_out(folder: Path) -> list[dict[str, Any]]:
    """Return a line, as in rollouts.jsonl, for each held-out prompt of the run in `folder`.

    The finished policy answers, and its answers count as those of the run's last step. Raises
    ConfigError for a run that is not offline, or that left no weights.
    """
    settings = _offline_settings(folder)
    if (folder / "model").is_dir():
        changes = {"path": str(folder / "model"), "adapter_path": ""}
    elif (folder / "adapters").is_dir():
        changes = {"adapter_path": str(folder / "adapters")}
    else:
        raise ConfigError(f"--generate: {folder} has neither adapters/ nor model/: finish the run")

    policy = load_policy(structs.replace(settings.model, **changes), seed=settings.run.seed)
    examples = open_examples(settings, policy).evaluation
    return answering(settings, policy, examples)(examples, _last_step(folder))[1]


def _offline_settings(folder: Path) -> PreferenceRun | SftRun:
    path = folder / "config.toml"
    match read_run(folder).program:
        case "preference":
            return load(PreferenceRun, path)
        case "sft":
            return load(SftRun, path)
        case program:
            raise ConfigError(
                f"--generate: {folder} is a run of launch/{program}.py without evaluation; only "
                "offline runs can answer afterwards. Set data.eval_rows in its recipe."
            )


def _last_step(folder: Path) -> int:
    lines = parse_lines((folder / "metrics.jsonl").read_bytes())
    return round(max((number(line, "step") or 0.0 for line in lines), default=0.0))
