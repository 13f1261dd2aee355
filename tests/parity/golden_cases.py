"""Recompute TRL's recorded cases with the learner's objectives: the format of `run_goldens.py`.

A grpo file has `inputs` and `cases`. A preference file has sections dpo, orpo, cpo and kto: a batch
with its cases, or a list of batches. Preference gradients are compared where the completion mask is
1, for TRL's labels mask the rest.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np

from learner.losses.dpo import DPO_LOSSES
from learner.losses.grpo import entropy_quantile, grpo_loss, grpo_normalisers
from learner.losses.kto import has_kl, kto_kl, kto_loss
from learner.losses.metrics import Metrics, finish_metrics, merge_metrics, token_mean
from learner.losses.orpo_cpo import cpo_terms, log_sigmoid_odds
from learner.losses.pairs import PairBatch, pair_normalisers
from learner.losses.preference import preference_loss
from protocol.config.settings import GrpoSettings, PreferenceSettings

GRPO_KEYS = {
    "loss": "loss_type", "level": "importance_sampling_level", "beta": "beta", "eps": "epsilon",
    "eps_hi": "epsilon_high", "delta": "delta", "bias_kl": "use_bias_correction_kl",
    "sapo_pos": "sapo_temperature_pos", "sapo_neg": "sapo_temperature_neg",
    "opsm": "off_policy_mask_threshold", "rho": "top_entropy_quantile",
}  # fmt: skip
DPO_KEYS = {
    "ls": "label_smoothing", "ld": "ld_alpha", "beta": "beta", "fd": "f_divergence_type",
    "fa": "f_alpha_divergence_coef", "alpha": "f_alpha_divergence_coef", "w": "loss_weights",
    "wpo": "use_weighting", "uw": "use_weighting", "tau": "discopop_tau",
}  # fmt: skip
KTO_KEYS = {"beta": "beta", "dw": "desirable_weight", "uw": "undesirable_weight"}
RESULT = {"loss", "grad", "metrics"}
STUBBED = {"logits/chosen", "logits/rejected", "mean_token_accuracy"}  # of TRL's stand-in model

Found = Iterator[tuple[str, Any, Any]]  # quantity, ours, TRL's


@dataclass(frozen=True)
class Case:
    """A recorded case: where it is, and what recomputes it in a precision.

    `single`: TRL itself computed it in float32, for its alpha divergence takes no float64.
    """

    where: str
    evaluate: Callable[[mx.Dtype], Found]
    single: bool = False


class FormatError(Exception):
    """The file is not of this format, or holds a key that the checker does not understand."""


def keys(got: Any, needed: set[str], optional: set[str], where: str) -> None:
    """Refuse what is no object, lacks one of `needed`, or has keys outside both."""
    if not isinstance(got, Mapping):
        raise FormatError(f"{where}: an object is required, got {type(got).__name__}")
    if extra := sorted(set(got) - needed - optional):
        raise FormatError(f"{where}: unknown keys {extra}; known are {sorted(needed | optional)}")
    if missing := sorted(needed - set(got)):
        raise FormatError(f"{where}: keys {missing} are missing")


def settings_of(cls: Any, values: Any, short: dict[str, str], where: str, **fixed: Any) -> Any:
    """Build settings from short or full names."""
    keys(values, set(), set(short) | set(cls.__struct_fields__), where)
    try:
        return msgspec.convert({short.get(k, k): v for k, v in values.items()} | fixed, cls)
    except msgspec.ValidationError as error:
        raise FormatError(f"{where}: {error}") from error


def array(values: Any, dtype: mx.Dtype) -> mx.array:
    """Return (...) in this precision."""
    return mx.array(np.asarray(values, np.float64), dtype=dtype)


def scalars(values: Mapping[str, float], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return normalisers as arrays."""
    return {k: mx.array(v, dtype=dtype) for k, v in values.items()}


def high_entropy(
    entropies: np.ndarray, mask: np.ndarray, quantile: float, dtype: mx.Dtype
) -> tuple[float, float]:
    """Return the smallest entropy that counts in this precision, and the tokens that do.

    TRL compares the file's float64 with a float32 quantile, which often is one of them, rounded up
    or down: the decision is made as there, and only then rounded.
    """
    threshold, _ = entropy_quantile(entropies, mask, quantile)
    kept = entropies[(mask > 0) & (entropies >= threshold)]
    return array(kept.min() if kept.size else np.inf, dtype).item(), float(kept.size)  # pyright: ignore[reportReturnType]


def grpo_case(inputs: Any, case: Any, where: str, dtype: mx.Dtype) -> Found:
    """Yield the comparisons of one case: one micro-batch of `ga` alike."""
    keys(case, {"cfg", "isr"} | RESULT, set(), where)
    cfg = dict(case["cfg"])
    keys(cfg, {"ga", "spg", "Lmax"}, set(cfg), where)
    ga, spg, longest = cfg.pop("ga"), cfg.pop("spg"), cfg.pop("Lmax")
    settings = settings_of(GrpoSettings, cfg, GRPO_KEYS, where)
    floats = partial(array, dtype=dtype)
    mask, ent = np.asarray(inputs["mask"], np.float64), np.asarray(inputs["ent"], np.float64)
    threshold, tokens = -math.inf, float(mask.sum())
    if settings.top_entropy_quantile < 1:
        threshold, tokens = high_entropy(ent, mask, settings.top_entropy_quantile, dtype)
    values = grpo_normalisers(
        mask_sums=np.repeat(mask.sum(1)[None], ga, 0).ravel(),
        max_completion_length=longest,
    )
    values["entropy_threshold"], values["entropy_tokens"] = threshold, max(tokens, 1.0) * ga
    values["tokens"] = max(float(mask.sum()), 1.0) * ga
    values["generation_tokens"] = max(inputs["n_items"], 1.0) * ga / spg

    def loss_of(logprobs: mx.array) -> Any:
        return grpo_loss(
            logprobs,
            floats(ent),
            advantages=floats(inputs["adv"]),
            mask=floats(mask),
            old_logprobs=mx.stop_gradient(logprobs)
            if inputs["old"] is None
            else floats(inputs["old"]),
            ref_logprobs=floats(inputs["ref"]) if settings.beta else None,
            sampling_logprobs=floats(inputs["sampling"]) if "sampling" in inputs else None,
            ratio=None if case["isr"] is None else floats(case["isr"]),
            normalisers=scalars(values, dtype),
            settings=settings,
        )

    (loss, metrics), grad = mx.value_and_grad(loss_of)(floats(inputs["logps"]))
    ours = finish_metrics(metrics)
    if "policy_loss" in ours and settings.loss_type not in ("dapo", "cispo", "vespo"):
        ours["policy_loss"] *= ga  # TRL logs it before dividing
    ours["entropy_coef"] = settings.entropy_coef
    yield "loss", loss.item(), case["loss"]
    yield "grad", np.array(grad), case["grad"]
    for name, value in case["metrics"].items():
        yield name, ours.get(name), value


def dpo_case(data: Any, case: Any, where: str, dtype: mx.Dtype) -> Found:
    """Yield the comparisons of one DPO case."""
    keys(case, {"loss_type", "kw"} | RESULT, set(), where)
    if unknown := sorted(set(case["loss_type"]) - set(DPO_LOSSES)):
        raise FormatError(f"{where}: unknown losses {unknown}; known are {sorted(DPO_LOSSES)}")
    settings = settings_of(
        PreferenceSettings, case["kw"], DPO_KEYS, where, loss_type=case["loss_type"]
    )
    floats = partial(array, dtype=dtype)
    whole = np.asarray(data["completion_mask"], np.float64)
    mask, half = whole[:, 1:], len(whole) // 2
    values = pair_normalisers(pairs=half, chosen_tokens=float(mask[:half].sum()))

    def loss_of(logprobs: mx.array) -> Any:
        pairs = PairBatch(
            logprobs=logprobs,
            mask=floats(mask),
            ref_logprobs=floats(data["ref"]),
            lengths=floats(whole.sum(1)),
            log_sum_sq_probs=floats(data["log_sum_sq_probs"]),
            normalisers=scalars(values, dtype),
        )
        return preference_loss(pairs, settings)

    (loss, metrics), grad = mx.value_and_grad(loss_of)(floats(data["logps"]))
    entropy = {"entropy": token_mean(mx.ones(mask.shape), floats(mask))}
    metrics = merge_metrics(metrics, Metrics(means=entropy))
    ours = finish_metrics(metrics) | {"num_tokens": float(whole.size)}
    yield "loss", loss.item(), case["loss"]
    yield "grad", np.array(grad) * mask, masked(case["grad"], mask)
    for name, value in case["metrics"].items():
        if name not in STUBBED:
            yield name, ours.get(name), value


def kto_case(data: Any, case: Any, where: str, dtype: mx.Dtype) -> Found:
    """Yield the comparisons of one KTO case over N answers; `kl_*` are of mismatched ones."""
    keys(case, {"loss_type", "kw"} | RESULT, set(), where)
    fixed = {"method": "kto", "loss_type": [case["loss_type"]]}
    settings = settings_of(PreferenceSettings, case["kw"], KTO_KEYS, where, **fixed)
    floats = partial(array, dtype=dtype)
    whole = np.asarray(data["completion_mask"], np.float64)
    mask, kl = whole[:, 1:], 0.0
    if has_kl(settings):
        kl_mask = np.asarray(data["kl_completion_mask"])[:, 1:]
        sums = [(np.asarray(data[name]) * kl_mask).sum(1) for name in ("kl_logps", "kl_ref")]
        kl = kto_kl(sums[0] - sums[1])

    def loss_of(logprobs: mx.array) -> Any:
        return kto_loss(
            logprobs,
            ref_logprobs=floats(data["ref"]),
            mask=floats(mask),
            labels=floats(data["labels"]),
            kl=mx.array(kl, dtype=dtype),
            normalisers=scalars({"answers": float(len(mask))}, dtype),
            settings=settings,
        )

    (loss, metrics), grad = mx.value_and_grad(loss_of)(floats(data["logps"]))
    entropy = {"entropy": token_mean(mx.ones(mask.shape), floats(mask))}
    metrics = merge_metrics(metrics, Metrics(means=entropy))
    ours = finish_metrics(metrics) | {"num_tokens": float(whole.size)}
    yield "loss", loss.item(), case["loss"]
    yield "grad", np.array(grad) * mask, masked(case["grad"], mask)
    for name in sorted((case["metrics"].keys() | ours.keys()) - STUBBED):
        yield name, ours.get(name), case["metrics"].get(name)


def orpo_case(case: Any, where: str, dtype: mx.Dtype) -> Found:
    """Yield the comparison of ORPO's odds-ratio terms, a pair's each."""
    keys(case, {"chosen", "rejected", "beta", "losses"}, set(), where)
    ratio = log_sigmoid_odds(array(case["chosen"], dtype), array(case["rejected"], dtype))
    yield "losses", np.array(case["beta"] * ratio), case["losses"]


def cpo_case(sides: Any, case: Any, where: str, dtype: mx.Dtype) -> Found:
    """Yield the comparison of CPO's terms, a pair's each, of its own log-probs or orpo's."""
    fields = set(PreferenceSettings.__struct_fields__)
    keys(case, {"loss_type", "losses"}, fields | {"chosen", "rejected"}, where)
    rest = {k: v for k, v in case.items() if k not in ("losses", "chosen", "rejected")}
    fixed = {"method": "cpo", "loss_type": [case["loss_type"]]}
    settings = settings_of(PreferenceSettings, rest, {}, where, **fixed)
    pair = case if "chosen" in case else sides
    keys(pair, {"chosen", "rejected"}, set(pair or ()), f"{where}, its own or orpo's log-probs")
    terms = cpo_terms(array(pair["chosen"], dtype), array(pair["rejected"], dtype), settings)
    yield "losses", np.array(terms), case["losses"]


def masked(grad: Any, mask: np.ndarray) -> np.ndarray:
    """Return TRL's gradient where the mask is 1."""
    return np.where(mask > 0, np.asarray(grad, np.float64), 0.0)


def objects(values: Any, where: str) -> list[dict[str, Any]]:
    """Return a list of objects as it is; refuse anything else."""
    if isinstance(values, list) and all(isinstance(value, dict) for value in values):
        return values
    raise FormatError(f"{where}: a list of objects is required")


def batches(data: Any, section: str) -> list[Any]:
    """Return a section's batches: it may be one, or a list of them."""
    found = data.get(section, [])
    return found if isinstance(found, list) else [found]


def preference_cases(data: Any, name: str) -> Iterator[Case]:
    """Yield the cases of every section."""
    shared = {"logps", "ref", "completion_mask", "cases"}
    own = {
        "dpo": (dpo_case, {"log_sum_sq_probs"}, set[str]()),
        "kto": (kto_case, {"labels"}, {"kl_logps", "kl_ref", "kl_completion_mask"}),
    }
    keys(data, set(), {"trl", "dpo", "orpo", "cpo", "kto"}, name)
    for section, (evaluate, needed, optional) in own.items():
        for index, batch in enumerate(batches(data, section)):
            at = f"{name} {section}[{index}]"
            keys(batch, shared | needed, optional, at)
            for number, case in enumerate(objects(batch["cases"], f"{at} cases")):
                where = f"{at}[{number}] {case.get('loss_type')}"
                single = "alpha_divergence" in dict(case.get("kw", {})).values()
                yield Case(where, partial(evaluate, batch, case, where), single)
    for index, case in enumerate(batches(data, "orpo")):
        where = f"{name} orpo[{index}]"
        yield Case(where, partial(orpo_case, case, where))
    sides = batches(data, "orpo")[0] if len(batches(data, "orpo")) == 1 else None
    for index, case in enumerate(objects(batches(data, "cpo"), f"{name} cpo")):
        where = f"{name} cpo[{index}] {case.get('loss_type')}"
        yield Case(where, partial(cpo_case, sides, case, where))


def grpo_cases(data: Any, name: str) -> Iterator[Case]:
    """Yield the cases of a GRPO file."""
    keys(data, {"inputs", "cases"}, {"trl"}, name)
    needed = {"logps", "old", "ref", "adv", "mask", "ent", "n_items"}
    keys(data["inputs"], needed, {"sampling"}, f"{name} inputs")
    for index, case in enumerate(objects(data["cases"], f"{name} cases")):
        where = f"{name} cases[{index}] {case.get('cfg', {}).get('loss')}"
        yield Case(where, partial(grpo_case, data["inputs"], case, where))


def cases_of(data: Any, name: str) -> Iterator[Case]:
    """Yield the cases of a file, whose format its keys tell."""
    keys(data, set(), {"trl", "inputs", "cases", "dpo", "orpo", "cpo", "kto"}, name)
    grpo = "inputs" in data or "cases" in data
    yield from (grpo_cases if grpo else preference_cases)(data, name)
