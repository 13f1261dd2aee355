"""Keys that a run would not read: refused where its program never does, else named in its log."""

from collections.abc import Collection, Iterator

from protocol.config.fields import leaf_fields
from protocol.config.settings import AnyRun, GrpoRun, PairsRun, PreferenceRun, Section, SftRun
from protocol.errors import require

ONLINE = (GrpoRun, PairsRun)
OFFLINE = (PreferenceRun, SftRun)
TRAINING = (GrpoRun, PreferenceRun, SftRun)
GRPO = "launch/grpo.py and launch/pairs.py"
NO_TRAINING = "programs that train, which launch/pairs.py does not"

# Keys, or whole sections, that not every program reads whose recipe may hold them: which do, in
# classes of their recipes and in words. All programs read the others.
READ_BY: dict[str, tuple[tuple[type[AnyRun], ...], str]] = {
    "run.log_completions": ((GrpoRun,), "launch/grpo.py; offline, eval.generate writes answers"),
    "run.resume": (TRAINING, f"{NO_TRAINING}; start anew, with another run.seed for other answers"),
    "run.save_steps": (TRAINING, NO_TRAINING),
    "run.save_total_limit": (TRAINING, NO_TRAINING),
    "model.lora": (TRAINING, NO_TRAINING),
    "model.reference": ((GrpoRun, PreferenceRun), "losses that have a reference"),
    "data.max_prompt_length": (ONLINE, f"{GRPO}; offline, data.max_length counts the prompt"),
    "data.overlong_prompts": (ONLINE, f"{GRPO}; offline, data.on_bad_row decides"),
    "data.max_length": (OFFLINE, "offline programs; GRPO has data.max_prompt_length"),
    "data.truncation_mode": (OFFLINE, "offline programs"),
    "data.eval_path": (TRAINING, NO_TRAINING),
    "data.eval_split": (TRAINING, NO_TRAINING),
    "rewards.max_none_batches": ((GrpoRun,), "launch/grpo.py"),
    "objective": (TRAINING, NO_TRAINING),
    "optimizer": (TRAINING, NO_TRAINING),
    "train.micro_batch_size": (TRAINING, NO_TRAINING),
    "train.head": (TRAINING, NO_TRAINING),
    "train.shared_prompt": ((GrpoRun,), "launch/grpo.py"),
    "train.gradient_checkpointing": (TRAINING, NO_TRAINING),
    "train.compile": (TRAINING, NO_TRAINING),
    "train.length_bucket": (TRAINING, NO_TRAINING),
    "eval.steps": (TRAINING, NO_TRAINING),
    "eval.at_start": (TRAINING, NO_TRAINING),
    "eval.max_completion_length": (TRAINING, NO_TRAINING),
    "eval.batch_size": (
        OFFLINE,
        "offline programs; GRPO's actors have actors.max_concurrent_completions",
    ),
    "eval.generate": (OFFLINE, "offline programs; GRPO's evaluation always samples"),
}
# Recipes that a program takes as they are, beside its own: keys that only their program reads are
# named in its log.
TAKES: dict[type[AnyRun], type[AnyRun]] = {PairsRun: GrpoRun}

_BARE = ("model.adapter_path", "model.fine_tune_type", "sampling.num_generations")


def readers(cls: type[Section], path: str) -> tuple[tuple[type[AnyRun], ...], str] | None:
    """Return who reads a key, in classes and in words, where the program of `cls` does not."""
    for name, (programs, words) in READ_BY.items():
        if (path == name or path.startswith(f"{name}.")) and cls not in programs:
            return programs, words
    return None


def check_read(run: AnyRun, flags: Collection[str] = ()) -> None:
    """Refuse keys that the run's program never reads: as flags, and as other values than the
    default's. Raises ConfigError."""
    cls = type(run)
    for path in _paths(cls):
        found = readers(cls, path)
        if found is None or not (path in flags or _is_set(run, path)):
            continue
        taken = TAKES.get(cls) in found[0] and path not in flags
        require(taken, path, f"is read by {found[1]}: leave it out", value_of(run, path))


def value_of(run: AnyRun, path: str) -> object:
    """Return the value of a key as it is written in flags."""
    value: object = run
    for name in path.split("."):
        value = getattr(value, name)
    return value


def unread(run: AnyRun) -> list[str]:
    """Return a line for each key that is set and has no effect on this run."""
    cls = type(run)
    never = [path for path in _paths(cls) if readers(cls, path) and _is_set(run, path)]
    lines = [f"{', '.join(never)}: without effect; nothing is trained here"] if never else []
    return lines + [
        f"{path} = {value_of(run, path)} has no effect {reason}"
        for path, reason in _idle(run)
        if _is_set(run, path) and path not in never
    ]


def _paths(cls: type[Section]) -> list[str]:
    return [field.path for field in leaf_fields(cls)]


def _is_set(run: AnyRun, path: str) -> bool:
    return value_of(run, path) != value_of(type(run)(), path)


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
    elif isinstance(run, OFFLINE) and not run.eval.generate:
        yield "eval.max_completion_length", "without eval.generate"
    if isinstance(run, PreferenceRun):
        objective = run.objective
        if objective.method not in ("dpo", "kto") or objective.reference_free:
            yield "model.reference", f"with {objective.method}, without a reference"
    if isinstance(run, PairsRun):
        yield from _idle_for_pairs(run)
    elif isinstance(run, GrpoRun):
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


def _idle_for_pairs(run: PairsRun) -> Iterator[tuple[str, str]]:
    if run.pairs.mode == "given":
        reason = 'with pairs.mode = "given", one answer of the bare model'
        yield from ((name, reason) for name in _BARE)
    else:
        yield "pairs.answer_column", 'without pairs.mode = "given"'
    if not run.rewards.functions:
        yield "rewards.reward_timeout_s", "without rewards.functions"
        yield "rewards.workers", "without rewards.functions"
