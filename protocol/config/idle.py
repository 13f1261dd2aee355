"""Keys that are set, but that other settings of the same run make idle: named in its log."""

from collections.abc import Iterator
from itertools import chain

from protocol.config.fields import leaf_fields, value_of
from protocol.config.objective_settings import GrpoSettings, PreferenceSettings
from protocol.config.settings import (
    AnyRun,
    BatchSettings,
    DataSettings,
    GrpoRun,
    LoraSettings,
    ModelSource,
    OfflineEval,
    OfflineRun,
    PairsRun,
    PreferenceRun,
    has_held_out,
)

# TRL ignores a setting, silently or with a warning, for any other loss.
LOSSES_OF = {
    ("dpo", "label_smoothing"): ("exo_pair", "robust", "aot", "aot_unpaired"),
    ("cpo", "label_smoothing"): ("sigmoid", "simpo"),
    ("dpo", "discopop_tau"): ("discopop",),
    ("cpo", "simpo_gamma"): ("simpo",),
}

Idle = Iterator[tuple[str, str]]


def idle(run: AnyRun) -> list[str]:
    """Return a line for each key that is set and has no effect on this run."""
    fields = leaf_fields(type(run))
    found = [_data(run.data), _model(run.model), _train(run.train)]
    found.append(_pairs(run) if isinstance(run, PairsRun) else _evaluation(run))
    if isinstance(run, PreferenceRun):
        found.append(_preference(run.objective))
    elif isinstance(run, GrpoRun):
        found.append(_grpo(run.objective))

    return [
        f"{path} = {value} has no effect {reason}"
        for path, reason in chain.from_iterable(found)
        if path in fields and (value := value_of(run, path)) != fields[path].default
    ]


def _data(data: DataSettings) -> Idle:
    if not data.streaming:
        yield "data.shuffle_buffer", "without data.streaming"
    elif data.order == "sequential":
        yield "data.shuffle_buffer", 'with data.order = "sequential"'


def _model(model: ModelSource) -> Idle:
    if not model.quantize_bits:
        yield "model.quantize_group_size", "without model.quantize_bits"
    if model.fine_tune_type == "full":
        for name in leaf_fields(LoraSettings):
            yield f"model.lora.{name}", 'with model.fine_tune_type = "full"'


def _train(train: BatchSettings) -> Idle:
    if train.max_steps > 0:
        yield "train.num_train_epochs", "with train.max_steps, which ends the run"


def _evaluation(run: GrpoRun | OfflineRun) -> Idle:
    if not has_held_out(run.data):
        for name in ("at_start", "batch_size", "max_completion_length"):
            yield f"eval.{name}", "without held-out rows"
    elif isinstance(run.eval, OfflineEval) and not run.eval.generate:
        yield "eval.max_completion_length", "without eval.generate"


def _pairs(run: PairsRun) -> Idle:
    if run.pairs.mode == "given":
        for path in ("model.adapter_path", "model.fine_tune_type", "sampling.num_generations"):
            yield path, 'with pairs.mode = "given", one answer of the bare model'
    else:
        yield "pairs.answer_column", 'without pairs.mode = "given"'
    if not run.rewards.functions:
        for name in ("reward_timeout_s", "workers"):
            yield f"rewards.{name}", "without rewards.functions"


def _grpo(objective: GrpoSettings) -> Idle:
    if objective.beta == 0:
        yield "model.reference", "with objective.beta = 0"
    if not objective.importance_sampling_correction:
        for name in ("mode", "clip_max", "clip_min"):
            path = f"objective.importance_sampling_{name}"
            yield path, "without objective.importance_sampling_correction"
    for loss in ("sapo", "vespo"):
        if objective.loss_type != loss:
            for name in leaf_fields(GrpoSettings):
                if name.startswith(f"{loss}_"):
                    yield f"objective.{name}", f'without objective.loss_type = "{loss}"'


def _preference(objective: PreferenceSettings) -> Idle:
    method, chosen = objective.method, objective.loss_type
    if method not in ("dpo", "kto") or objective.reference_free:
        yield "model.reference", f"with {method}, without a reference"
    for (of, name), losses in LOSSES_OF.items():
        if method == of and not set(losses) & set(chosen):
            reason = f"with {', '.join(chosen)}, as in TRL: it is for {', '.join(losses)}"
            yield f"objective.{name}", reason
    if objective.f_divergence_type != "alpha_divergence":
        reason = 'without objective.f_divergence_type = "alpha_divergence"'
        yield "objective.f_alpha_divergence_coef", reason
