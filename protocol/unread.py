"""Keys that a run would not read: refused where its program never does, else named in its log."""

from collections.abc import Iterator

from protocol.errors import require
from protocol.settings import AnyRun, GrpoRun, PreferenceRun, SftRun

OFFLINE = (PreferenceRun, SftRun)
GRPO = "launch/grpo.py and launch/pairs.py"
READ_BY: dict[str, tuple[tuple[type[AnyRun], ...], str]] = {
    "run.log_completions": ((GrpoRun,), f"{GRPO}; offline, eval.generate writes answers"),
    "data.max_prompt_length": ((GrpoRun,), f"{GRPO}; offline, data.max_length counts the prompt"),
    "data.overlong_prompts": ((GrpoRun,), f"{GRPO}; offline, data.on_bad_row decides"),
    "train.shared_prompt": ((GrpoRun,), GRPO),
    "data.max_length": (OFFLINE, "offline programs; GRPO has data.max_prompt_length"),
    "data.truncation_mode": (OFFLINE, "offline programs"),
    "eval.batch_size": (OFFLINE, "offline programs; GRPO's actors have actors.max_rows"),
    "eval.generate": (OFFLINE, "offline programs; GRPO's evaluation always samples"),
    "model.reference": ((GrpoRun, PreferenceRun), "losses that have a reference"),
}


def check_read(run: AnyRun) -> None:
    """Refuse keys that the run's program never reads; raises ConfigError."""
    for path, (programs, where) in READ_BY.items():
        unset = value_of(run, path) == value_of(type(run)(), path)
        rule = f"is read by {where}: leave it out"
        require(unset or isinstance(run, programs), path, rule, value_of(run, path))


def value_of(run: AnyRun, path: str) -> object:
    """Return the value of a key as it is written in flags."""
    value: object = run
    for name in path.split("."):
        value = getattr(value, name)
    return value


def unread(run: AnyRun) -> list[str]:
    """Return a line for each key that is set and that the run's other settings leave unread."""
    return [
        f"{path} = {value_of(run, path)} has no effect {reason}"
        for path, reason in _idle(run)
        if value_of(run, path) != value_of(type(run)(), path)
    ]


def _idle(run: AnyRun) -> Iterator[tuple[str, str]]:
    data, model = run.data, run.model
    if not data.streaming:
        yield "data.shuffle_buffer", "without data.streaming"
    elif data.order == "sequential":
        yield "data.shuffle_buffer", 'with data.order = "sequential"'
    if not model.quantize_bits:
        yield "model.quantize_group_size", "without model.quantize_bits"
    if model.fine_tune_type == "full":
        for name in ("rank", "scale", "dropout", "num_layers", "keys"):
            yield f"model.lora.{name}", 'with model.fine_tune_type = "full"'
    if run.train.max_steps > 0:
        yield "train.num_train_epochs", "with train.max_steps, which ends the run"
    if not (data.eval_rows or data.eval_path or data.eval_split):
        for name in ("at_start", "batch_size", "max_completion_length"):
            yield f"eval.{name}", "without held-out rows"
    elif not isinstance(run, GrpoRun) and not run.eval.generate:
        yield "eval.max_completion_length", "without eval.generate"
    if isinstance(run, PreferenceRun):
        objective = run.objective
        if objective.method not in ("dpo", "kto") or objective.reference_free:
            yield "model.reference", f"with {objective.method}, without a reference"
    if isinstance(run, GrpoRun):
        if run.objective.beta == 0:
            yield "model.reference", "with objective.beta = 0"
        if not run.objective.importance_sampling_correction:
            for name in ("mode", "clip_max", "clip_min"):
                path = f"objective.importance_sampling_{name}"
                yield path, "without objective.importance_sampling_correction"
        for loss in ("sapo", "vespo"):
            if run.objective.loss_type != loss:
                for name in run.objective.__struct_fields__:
                    if name.startswith(f"{loss}_"):
                        yield f"objective.{name}", f'without objective.loss_type = "{loss}"'
