"""Hold the objectives to what TRL computed: `python tests/parity/run_goldens.py DIR`.

DIR holds grpo.json and/or preference.json. Prints passed/total and each failure with both values;
exits 1 on a failure, an unknown key, or a folder without cases. Bar: 1e-6 relative, 1e-7 absolute.
preference.json has sections dpo, orpo, cpo and kto (a batch of judged answers with its cases, or a
list of batches). Preference gradients are compared where the completion mask is 1, for TRL's labels
mask the rest.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np

from learner.objectives.grpo import entropy_quantile, grpo_loss, grpo_normalisers
from learner.objectives.metrics import finish_metrics
from learner.objectives.odds import cpo_terms, log_sigmoid_odds
from learner.objectives.preference import (
    finish_kto,
    kto_kl,
    kto_loss,
    kto_loss_type,
    pair_normalisers,
    preference_loss,
)
from protocol.settings import GrpoSettings, PreferenceSettings

RELATIVE, ABSOLUTE = 1e-6, 1e-7
GRPO_KEYS = {
    "loss": "loss_type", "level": "importance_sampling_level", "beta": "beta", "eps": "epsilon",
    "eps_hi": "epsilon_high", "delta": "delta", "bias_kl": "use_bias_correction_kl",
    "sapo_pos": "sapo_temperature_pos", "sapo_neg": "sapo_temperature_neg",
    "opsm": "off_policy_mask_threshold", "rho": "top_entropy_quantile",
}  # fmt: skip
DPO_KEYS = {
    "ls": "label_smoothing", "ld": "ld_alpha", "beta": "beta", "fd": "f_divergence_type",
    "fa": "f_alpha_divergence_coef", "w": "loss_weights", "wpo": "use_weighting",
    "tau": "discopop_tau",
}  # fmt: skip
KTO_KEYS = {"beta": "beta", "dw": "desirable_weight", "uw": "undesirable_weight"}
STUBBED = {"logits/chosen", "logits/rejected", "mean_token_accuracy"}  # of TRL's stand-in model
Found = Iterator[tuple[str, str, Any, Any]]


class UnknownKeyError(Exception):
    """The file holds a key that this checker does not understand."""


def known(got: Mapping[str, Any], allowed: set[str], where: str) -> None:
    """Refuse keys outside `allowed`."""
    if extra := sorted(set(got) - allowed):
        raise UnknownKeyError(f"{where}: unknown keys {extra}; known are {sorted(allowed)}")


def settings_of(cls: Any, values: Mapping[str, Any], short: dict[str, str], where: str) -> Any:
    """Build settings from short or full names."""
    fields = set(cls.__struct_fields__)
    known(values, set(short) | fields, where)
    return msgspec.convert({short.get(k, k): v for k, v in values.items()}, cls)


def floats(values: Any) -> mx.array:
    """Return (…) float32."""
    return mx.array(np.asarray(values, np.float32))


def scalars(values: Mapping[str, float]) -> dict[str, mx.array]:
    """Return normalisers as arrays."""
    return {k: mx.array(v, dtype=mx.float32) for k, v in values.items()}


def grpo_case(inputs: dict[str, Any], case: dict[str, Any], where: str) -> Found:
    """Yield (where, quantity, ours, TRL's) of one case: one micro-batch of `ga` alike."""
    known(case, {"cfg", "isr", "loss", "grad", "metrics"}, where)
    cfg = dict(case["cfg"])
    ga, spg, longest = cfg.pop("ga"), cfg.pop("spg"), cfg.pop("Lmax")
    settings = settings_of(GrpoSettings, cfg, GRPO_KEYS, where)
    mask, ent = np.asarray(inputs["mask"], np.float32), np.asarray(inputs["ent"], np.float32)
    threshold, tokens = None, float(mask.sum())
    if settings.top_entropy_quantile < 1:
        threshold, tokens = entropy_quantile(ent, mask, settings.top_entropy_quantile)
    values = grpo_normalisers(
        mask_sums=np.repeat(mask.sum(1)[None], ga, 0).ravel(),
        max_completion_length=longest,
        entropy_threshold=threshold,
        entropy_tokens=max(tokens, 1.0) * ga,
    )
    values["tokens"] = max(float(mask.sum()), 1.0) * ga
    values["generation_tokens"] = max(inputs["n_items"], 1.0) * ga / spg

    def loss_of(logps: mx.array) -> Any:
        return grpo_loss(
            logps,
            floats(ent),
            advantages=floats(inputs["adv"]),
            mask=floats(mask),
            old_logps=mx.stop_gradient(logps) if inputs["old"] is None else floats(inputs["old"]),
            ref_logps=floats(inputs["ref"]) if settings.beta else None,
            sampling_logps=floats(inputs["sampling"]) if "sampling" in inputs else None,
            ratio=None if case["isr"] is None else floats(case["isr"]),
            normalisers=scalars(values),
            settings=settings,
        )

    (loss, metrics), grad = mx.value_and_grad(loss_of)(floats(inputs["logps"]))
    ours = finish_metrics(metrics)
    if "policy_loss" in ours and settings.loss_type not in ("dapo", "cispo", "vespo"):
        ours["policy_loss"] *= ga  # TRL logs it before dividing
    ours["entropy_coef"] = settings.entropy_coef
    yield where, "loss", loss.item(), case["loss"]
    yield where, "grad", np.array(grad), case["grad"]
    for name, value in case["metrics"].items():
        yield where, name, ours.get(name), value


def dpo_case(data: dict[str, Any], case: dict[str, Any], where: str) -> Found:
    """Yield the comparisons of one DPO case."""
    known(case, {"loss_type", "kw", "loss", "grad", "metrics"}, where)
    settings = settings_of(PreferenceSettings, case["kw"], DPO_KEYS, where)
    settings = msgspec.structs.replace(settings, loss_type=case["loss_type"])
    whole = np.asarray(data["completion_mask"], np.float32)
    mask, half = whole[:, 1:], len(whole) // 2
    values = pair_normalisers(rows=half, chosen_tokens=float(mask[:half].sum()))

    def loss_of(logps: mx.array) -> Any:
        return preference_loss(
            logps,
            mask=floats(mask),
            ref_logps=floats(data["ref"]),
            lengths=floats(whole.sum(1)),
            log_sum_sq_probs=floats(data["log_sum_sq_probs"]),
            entropies=mx.ones(mask.shape),
            normalisers=scalars(values),
            settings=settings,
        )

    (loss, metrics), grad = mx.value_and_grad(loss_of)(floats(data["logps"]))
    ours = finish_metrics(metrics) | {"num_tokens": float(whole.size)}
    yield where, "loss", loss.item(), case["loss"]
    yield where, "grad", np.array(grad) * mask, np.asarray(case["grad"]) * mask
    for name, value in case["metrics"].items():
        if name not in STUBBED:
            yield where, name, ours.get(name), value


def kto_case(data: dict[str, Any], case: dict[str, Any], where: str) -> Found:
    """Yield the comparisons of one KTO case over N answers; `kl_*` are of mismatched ones."""
    known(case, {"loss_type", "kw", "loss", "grad", "metrics"}, where)
    settings = settings_of(PreferenceSettings, case["kw"], KTO_KEYS, where)
    settings = msgspec.structs.replace(settings, method="kto", loss_type=[case["loss_type"]])
    whole = np.asarray(data["completion_mask"], np.float32)
    mask, kl = whole[:, 1:], 0.0
    if kto_loss_type(settings) == "kto":
        kl_mask = np.asarray(data["kl_completion_mask"])[:, 1:]
        sums = [(np.asarray(data[name]) * kl_mask).sum(1) for name in ("kl_logps", "kl_ref")]
        kl = kto_kl(*sums)

    def loss_of(logps: mx.array) -> Any:
        return kto_loss(
            logps,
            ref_logps=floats(data["ref"]),
            mask=floats(mask),
            labels=floats(data["labels"]),
            kl=mx.array(kl, dtype=mx.float32),
            normalisers=scalars({"rows": float(len(mask))}),
            settings=settings,
        )

    (loss, metrics), grad = mx.value_and_grad(loss_of)(floats(data["logps"]))
    ours = finish_kto(metrics) | {"num_tokens": float(whole.size), "entropy": 1.0}
    yield where, "loss", loss.item(), case["loss"]
    yield where, "grad", np.array(grad) * mask, np.asarray(case["grad"]) * mask
    for name in sorted((case["metrics"].keys() | ours.keys()) - STUBBED):
        yield where, name, ours.get(name), case["metrics"].get(name)


def pair_cases(data: dict[str, Any]) -> Iterator[tuple[str, Found]]:
    """Yield the ORPO and CPO cases, whose losses are a pair's."""
    sides = data.get("orpo")
    for index, orpo in enumerate([sides] if isinstance(sides, dict) else sides or []):
        where = f"preference.json orpo[{index}]"
        known(orpo, {"chosen", "rejected", "beta", "losses"}, where)
        ratio = log_sigmoid_odds(floats(orpo["chosen"]), floats(orpo["rejected"]))
        yield where, iter([(where, "losses", np.array(orpo["beta"] * ratio), orpo["losses"])])
    for index, case in enumerate(data.get("cpo", [])):
        where = f"preference.json cpo[{index}] {case.get('loss_type')}"
        rest = {k: v for k, v in case.items() if k not in ("losses", "chosen", "rejected")}
        rest["loss_type"] = [rest["loss_type"]]
        settings = settings_of(PreferenceSettings, rest, {}, where)
        settings = msgspec.structs.replace(settings, method="cpo")
        pair = case if "chosen" in case else sides
        if not isinstance(pair, dict):
            raise UnknownKeyError(f"{where}: no chosen and rejected, nor an orpo entry with them")
        terms = cpo_terms(floats(pair["chosen"]), floats(pair["rejected"]), settings)
        yield where, iter([(where, "losses", np.array(terms), case["losses"])])


def kto_cases(data: dict[str, Any]) -> Iterator[tuple[str, Found]]:
    """Yield the KTO cases: of one batch of answers, or of several."""
    batches = data.get("kto", [])
    for index, batch in enumerate([batches] if isinstance(batches, dict) else batches):
        at = f"preference.json kto[{index}]"
        mismatched = {"kl_logps", "kl_ref", "kl_completion_mask"}
        known(batch, {"logps", "ref", "completion_mask", "labels", "cases"} | mismatched, at)
        for number, case in enumerate(batch["cases"]):
            where = f"{at}[{number}] {case.get('loss_type')}"
            yield where, kto_case(batch, case, where)


def cases(folder: Path) -> Iterator[tuple[str, Found]]:
    """Yield every case of a folder, with its comparisons."""
    if (path := folder / "grpo.json").is_file():
        data = json.loads(path.read_text())
        known(data, {"trl", "inputs", "cases"}, "grpo.json")
        needed = {"logps", "old", "ref", "adv", "mask", "ent", "n_items"}
        known(data["inputs"], needed | {"sampling"}, "grpo.json inputs")
        for index, case in enumerate(data["cases"]):
            where = f"grpo.json cases[{index}] {case['cfg'].get('loss')}"
            yield where, grpo_case(data["inputs"], case, where)
    if (path := folder / "preference.json").is_file():
        data = json.loads(path.read_text())
        known(data, {"trl", "dpo", "orpo", "cpo", "kto"}, "preference.json")
        dpo = data.get("dpo", {"cases": []})
        inputs = {"logps", "ref", "completion_mask", "log_sum_sq_probs", "cases"}
        known(dpo, inputs, "preference.json dpo")
        for index, case in enumerate(dpo["cases"]):
            where = f"preference.json dpo[{index}] {case.get('loss_type')}"
            yield where, dpo_case(dpo, case, where)
        yield from pair_cases(data)
        yield from kto_cases(data)


def difference(ours: Any, theirs: Any) -> str | None:
    """Return both values where they differ beyond the bar, or shapes that do."""
    if ours is None or theirs is None:
        return None if ours is theirs else f"ours {ours}, TRL {theirs}"
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        return f"ours has shape {a.shape}, TRL {b.shape}"
    bad = ~(
        (np.abs(a - b) <= np.maximum(RELATIVE * np.abs(b), ABSOLUTE)) | (np.isnan(a) & np.isnan(b))
    )
    if not bad.any():
        return None
    at = tuple(np.argwhere(bad)[0])
    return f"ours {a[at]:.9g}, TRL {b[at]:.9g} at {tuple(map(int, at))} ({bad.sum()} of {bad.size})"


def main(folder: Path) -> int:
    """Check a folder; return the exit status."""
    passed = total = 0
    try:
        for _, found in cases(folder):
            faults = [
                f"FAIL {where}: {name}: {text}"
                for where, name, ours, theirs in found
                if (text := difference(ours, theirs))
            ]
            total += 1
            passed += not faults
            print("\n".join(faults), end="\n" if faults else "")
    except (UnknownKeyError, msgspec.ValidationError, KeyError) as error:
        print(f"{folder}: {error}", file=sys.stderr)
        return 1
    print(f"{passed}/{total}")
    if not total:
        print(f"{folder} has no cases: grpo.json or preference.json is required", file=sys.stderr)
    return 0 if total and passed == total else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/parity/run_goldens.py DIR")
    sys.exit(main(Path(sys.argv[1])))
