"""Refuses preference settings that are undefined or that TRL 1.16.0's trainers refuse."""

from protocol.config.fields import check_section
from protocol.config.objective_settings import PreferenceSettings
from protocol.config.settings import PreferenceRun, has_held_out
from protocol.errors import did_you_mean, require

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
KTO_LOSSES = ("kto", "apo_zero_unpaired")
# The losses of each method; one that is not listed has no choice of loss.
METHOD_LOSSES = {
    "dpo": DPO_LOSSES,
    "cpo": ("sigmoid", "hinge", "ipo", "simpo"),
    "simpo": ("simpo",),
    "kto": KTO_LOSSES,
}

# f-DPO leaves a term in log Z(x) that cancels in a difference of the two scores alone.
DIVERGENCE_LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft",
)  # fmt: skip
SORTING_LOSSES = ("aot", "aot_unpaired")

# TRL has a configuration for each trainer, and refuses keys of the others.
METHODS_OF = {
    "loss_weights": ("dpo",),
    "label_smoothing": ("dpo", "cpo", "simpo"),
    "f_divergence_type": ("dpo",),
    "f_alpha_divergence_coef": ("dpo",),
    "ld_alpha": ("dpo",),
    "use_weighting": ("dpo",),
    "discopop_tau": ("dpo",),
    "simpo_gamma": ("cpo", "simpo"),
    "cpo_alpha": ("cpo", "simpo"),
    "alpha": ("cpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference_free": ("dpo",),
    "precompute_ref_log_probs": ("dpo", "kto"),
}


def check_preference(settings: PreferenceSettings) -> None:
    """Refuse what cannot be computed, or is of another method; raises ConfigError."""
    check_section(settings, "objective")
    _check_losses(settings)

    defaults = PreferenceSettings()
    for name, methods in METHODS_OF.items():
        value: object = getattr(settings, name)
        rule = f"is for objective.method = {' or '.join(map(repr, methods))} only: leave it out"
        fits = settings.method in methods or value == getattr(defaults, name)
        require(fits, f"objective.{name}", rule, value)

    if settings.method == "dpo":
        _check_dpo(settings)


def check_preference_run(run: PreferenceRun) -> None:
    """Refuse what clashes with the rest of a run; raises ConfigError.

    TRL requires sequential order for kto, because it mismatches answers once, before training. We
    mismatch within each batch, so any order will do.
    """
    check_preference(run.objective)
    if run.objective.precompute_ref_log_probs:
        _check_precompute(run)
    if run.objective.method == "kto" and run.objective.loss_type != ["apo_zero_unpaired"]:
        rule = "must be at least 2 with kto: its KL term pairs each prompt with another's answer"
        require(run.train.batch_size > 1, "train.batch_size", rule, run.train.batch_size)
        size = run.eval.batch_size
        require(size > 1 or not has_held_out(run.data), "eval.batch_size", rule, size)


def _check_losses(settings: PreferenceSettings) -> None:
    method, losses, weights = settings.method, settings.loss_type, settings.loss_weights
    field = "objective.loss_type"
    require(bool(losses), field, "must name at least one loss", losses)
    shown = METHOD_LOSSES.get(method, ())
    valid = (*shown, "sigmoid")  # the default, which stands for a method's first loss
    rule = (
        f"must be of {', '.join(shown)} for objective.method = {method!r}"
        if shown
        else f"is not used by objective.method = {method!r}: leave it out"
    )
    if losses == ["alphapo"]:
        rule += '; AlphaPO is method "simpo" with cpo_alpha = 0 and alpha'

    wrong = [loss for loss in losses if loss not in valid]
    rule += did_you_mean(wrong[0], valid) if wrong else ""
    require(not wrong, field, rule, losses)
    rule = f"must be one loss for objective.method = {method!r}"
    require(method == "dpo" or len(losses) == 1, field, rule, losses)
    require(
        weights is None or len(weights) == len(losses),
        "objective.loss_weights",
        f"must hold one weight for each of the {len(losses)} objective.loss_type",
        weights,
    )


def _check_dpo(settings: PreferenceSettings) -> None:
    losses = settings.loss_type
    others = [loss for loss in losses if loss not in DIVERGENCE_LOSSES]
    require(
        settings.f_divergence_type == "reverse_kl" or not others,
        "objective.f_divergence_type",
        f'must be "reverse_kl" with {", ".join(others)}; other divergences are for '
        f"{', '.join(DIVERGENCE_LOSSES)}",
        settings.f_divergence_type,
    )

    sorting = [loss for loss in losses if loss in SORTING_LOSSES]
    require(
        not (settings.use_weighting and sorting),
        "objective.use_weighting",
        f"must be false with {', '.join(sorting)}, whose sorting separates pairs from weights",
        settings.use_weighting,
    )

    require(
        "exo_pair" not in losses or settings.label_smoothing > 0,
        "objective.label_smoothing",
        "must be above 0 with exo_pair, which takes its logarithm; its paper has 0.001",
        settings.label_smoothing,
    )


def check_scores(settings: PreferenceSettings) -> None:
    """Raise ConfigError where a loss cannot weigh pairs by their `preference_score`."""
    sorting = [loss for loss in settings.loss_type if loss in SORTING_LOSSES]
    require(
        settings.method != "dpo" or not sorting,
        "objective.loss_type",
        f"must be without {', '.join(sorting)} where rows have a preference_score, because "
        "sorting separates pairs from their scores; drop that column with data.prepare, or take "
        "another loss",
        settings.loss_type,
    )


def _check_precompute(run: PreferenceRun) -> None:
    field, settings = "objective.precompute_ref_log_probs", run.objective
    rule = "must be false with objective.reference_free: there is no reference"
    require(not settings.reference_free, field, rule, True)
    rule = "must be false with data.streaming, whose rows are not known before they are read"
    require(not run.data.streaming, field, rule, True)
    changing = settings.method == "kto" and settings.loss_type != ["apo_zero_unpaired"]
    require(
        not changing or run.data.order == "sequential",
        field,
        'needs data.order = "sequential" with the kto loss, whose KL term pairs each prompt with '
        "the answer before it: other orders change those pairs every epoch",
        run.data.order,
    )
