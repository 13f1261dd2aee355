"""The table of offline methods: one row for each method of the settings."""

from typing import get_args, get_type_hints

import pytest

from learner.objectives.methods import METHODS, method_of
from protocol.config.settings import PreferenceRun, PreferenceSettings, SftRun


def test_every_method_of_the_settings_has_a_row():
    named = get_args(get_type_hints(PreferenceSettings)["method"])
    assert METHODS.keys() == {"sft", *named}


@pytest.mark.parametrize(
    ("settings", "reference", "whole", "sequences"),
    [
        (PreferenceSettings(), True, False, 2),
        (PreferenceSettings(loss_type=["aot"], reference_free=True), False, True, 2),
        (PreferenceSettings(method="simpo"), False, False, 2),
        (PreferenceSettings(method="kto"), True, False, 1),
    ],
    ids=["dpo", "aot", "simpo", "kto"],
)
def test_what_a_method_needs(settings, reference, whole, sequences):
    run = PreferenceRun(objective=settings)
    method = method_of(run)
    assert method.needs_reference(run) == reference
    assert method.needs_whole_batch(run) == whole
    assert method.sequences == sequences
    assert method.reference_layout(run) is None  # only with precompute_ref_log_probs


def test_sft_needs_no_reference():
    run = SftRun()
    method = method_of(run)
    assert not method.needs_reference(run)
    assert method.reference_layout(run) is None
    assert "messages" in (method.builder(run, None).columns or ())
