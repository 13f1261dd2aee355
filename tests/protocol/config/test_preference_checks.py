"""What TRL 1.16.0's preference trainers refuse is refused; what they ignore is named."""

import pytest

from protocol.config.idle import idle
from protocol.config.load import load
from protocol.config.preference_checks import DIVERGENCE_LOSSES, DPO_LOSSES, check_preference
from protocol.config.settings import PreferenceRun, PreferenceSettings
from protocol.errors import ConfigError

OFFLINE = ["--model.path=m", "--data.path=d"]
METHODS = ["dpo", "cpo", "simpo", "orpo", "kto"]
# A value other than the default, and the methods whose TRL configuration has the key.
KEYS = {
    "loss_weights": ([1.0], "dpo"),
    "label_smoothing": (0.1, "dpo cpo simpo"),
    "f_divergence_type": ("js_divergence", "dpo"),
    "f_alpha_divergence_coef": (0.7, "dpo"),
    "ld_alpha": (0.5, "dpo"),
    "use_weighting": (True, "dpo"),
    "discopop_tau": (0.1, "dpo"),
    "simpo_gamma": (1.0, "cpo simpo"),
    "cpo_alpha": (0.0, "cpo simpo"),
    "alpha": (0.25, "cpo simpo"),
    "desirable_weight": (1.5, "kto"),
    "undesirable_weight": (1.5, "kto"),
    "reference_free": (True, "dpo"),
    "precompute_ref_log_probs": (True, "dpo kto"),
}


def idle_of(settings):
    return idle(PreferenceRun(objective=settings))


def refused(**values):
    with pytest.raises(ConfigError) as error:
        check_preference(PreferenceSettings(**values))
    return str(error.value)


@pytest.mark.parametrize("name", DPO_LOSSES)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences_are_for_differences_of_scores(name, divergence):
    values = {"loss_type": [name], "f_divergence_type": divergence, "label_smoothing": 0.1}
    if name in ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"):
        assert refused(**values).startswith(
            f'objective.f_divergence_type must be "reverse_kl" with {name}; '
        )
        mixed = refused(**values | {"loss_type": ["sigmoid", name]})
        assert f"with {name};" in mixed
    else:
        assert name in DIVERGENCE_LOSSES
        check_preference(PreferenceSettings(**values))


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_weighting_is_not_for_losses_that_sort(name):
    values = {"loss_type": [name], "use_weighting": True, "label_smoothing": 0.1}
    if name in ("aot", "aot_unpaired"):
        assert f"objective.use_weighting must be false with {name}" in refused(**values)
    else:
        check_preference(PreferenceSettings(**values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"loss_type": ["exo_pair"]}, "objective.label_smoothing must be above 0 with exo_pair"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "must be in [0, 0.5), got 0.5"),
        ({"loss_type": ["sigmoid"], "loss_weights": [1.0, 2.0]}, "one weight for each of the 1"),
        ({"loss_type": ["kto_pair"]}, "must be of sigmoid, hinge"),
        ({"loss_type": []}, "must name at least one loss"),
        ({"method": "cpo", "loss_type": ["kto_pair"]}, "must be of sigmoid, hinge, ipo, simpo"),
        ({"method": "cpo", "loss_type": ["hinge", "ipo"]}, "must be one loss"),
        ({"method": "cpo", "loss_type": ["alphapo"]}, "cpo_alpha = 0 and alpha"),
        ({"method": "simpo", "loss_type": ["hinge"]}, "must be of simpo"),
        ({"method": "orpo", "loss_type": ["hinge"]}, "is not used by objective.method = 'orpo'"),
        ({"method": "kto", "loss_type": ["bco"]}, "must be of kto, apo_zero_unpaired"),
        ({"beta": 0.0}, "objective.beta must be positive"),
        ({"ld_alpha": 1.5}, "objective.ld_alpha must be none or in [0, 1]"),
        ({"method": "kto", "desirable_weight": 0.0}, "objective.desirable_weight must be positive"),
    ],
)
def test_losses_that_do_not_exist_or_are_undefined(values, said):
    assert said in refused(**values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", KEYS)
def test_keys_of_another_trainer_are_refused(method, key):
    value, methods = KEYS[key]
    values = {"method": method, key: value}
    if method in methods.split():
        check_preference(PreferenceSettings(**values))
    else:
        assert refused(**values).startswith(f"objective.{key} is for objective.method = ")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_its_defaults(method):
    check_preference(PreferenceSettings(method=method))
    assert not idle_of(PreferenceSettings(method=method))


def test_ktos_kl_needs_two_answers():
    kto = [*OFFLINE, "--objective.method=kto"]
    one = ["--train.batch_size=1"]
    with pytest.raises(ConfigError, match=r"train\.batch_size must be at least 2 with kto"):
        load(PreferenceRun, None, [*kto, *one])
    load(PreferenceRun, None, [*kto, *one, "--objective.loss_type=apo_zero_unpaired"])
    load(PreferenceRun, None, [*kto, "--eval.batch_size=1"])
    with pytest.raises(ConfigError, match=r"eval\.batch_size must be at least 2 with kto"):
        load(PreferenceRun, None, [*kto, "--eval.batch_size=1", "--data.eval_rows=4"])
    load(PreferenceRun, None, [*OFFLINE, *one])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing = 0.1 has no effect with sigmoid, as in TRL"),
        ({"label_smoothing": 0.1, "loss_type": ["aot"]}, None),
        ({"label_smoothing": 0.1, "loss_type": ["sigmoid", "robust"]}, None),
        ({"method": "cpo", "loss_type": ["hinge"], "label_smoothing": 0.1}, "with hinge"),
        ({"method": "cpo", "label_smoothing": 0.1}, None),
        ({"method": "cpo", "simpo_gamma": 1.0}, "it is for simpo"),
        ({"method": "simpo", "simpo_gamma": 1.0, "label_smoothing": 0.1}, None),
        ({"discopop_tau": 0.1}, "it is for discopop"),
        ({"f_alpha_divergence_coef": 0.3}, "alpha_divergence"),
    ],
)
def test_settings_that_trl_ignores_are_named(values, said):
    lines = idle_of(PreferenceSettings(**values))
    if said is None:
        assert lines == []
    else:
        assert len(lines) == 1
        assert said in lines[0]
