"""What TRL computes of preference losses on random inputs: its DPO, KTO, ORPO and CPO trainers."""

# pyright: reportMissingImports=false
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl_stubs import ONE, last, tensor

DPO_NAMES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DPO_EXTRA = [
    (["sigmoid"], {"fd": "forward_kl"}), (["hinge"], {"fd": "js_divergence"}),
    (["sigmoid"], {"fd": "alpha_divergence"}), (["sigmoid"], {"ld": 0.4}), (["ipo"], {"wpo": True}),
    (["sigmoid", "sft"], {"w": [0.7, 0.3]}), (["sigmoid_norm"], {"beta": 0.6}),
    (["discopop"], {"tau": 0.2}), (["robust"], {"ls": 0.2}), (["exo_pair"], {"ls": 0.05}),
    (["aot_unpaired"], {"ls": 0.15}),
    (["hinge", "sft", "bco_pair"], {"w": [0.5, 0.1, 1.2], "beta": 1.0}),
    (["sigmoid", "nca_pair"], {"wpo": True, "ld": 0.0}), (["sppo_hard"], {"ld": 0.5, "beta": 0.5}),
    (["apo_down", "sigmoid_norm"], {"w": [0.0, 2.0], "ld": 0.7}),
    (["sigmoid"], {"fd": "alpha_divergence", "fa": 1.0}),
    (["sigmoid"], {"fd": "alpha_divergence", "fa": 1.5}),
    (["exo_pair"], {"fd": "forward_kl", "ls": 0.001, "beta": 0.5}),
]  # fmt: skip


KTO_CASES = [
    ("kto", {}), ("kto", {"beta": 0.4}), ("kto", {"dw": 1.33, "uw": 0.7}),
    ("apo_zero_unpaired", {}), ("apo_zero_unpaired", {"beta": 0.4, "uw": 2.0}),
]  # fmt: skip


class StandIn(torch.nn.Module):
    """What DPOTrainer asks of a model besides its outputs."""

    is_gradient_checkpointing = False


def dpo_case(data, names, kw):
    """Return one case of DPOTrainer._compute_loss with precomputed reference log-probs."""
    trainer = DPOTrainer.__new__(DPOTrainer)
    # TRL's alpha divergence takes no float64.
    dtype = torch.float32 if kw.get("fd") == "alpha_divergence" else torch.float64
    logprobs = tensor(data["logps"]).to(dtype).requires_grad_()
    mask = torch.tensor(data["completion_mask"])
    ones = torch.ones_like(logprobs)
    ref, squares = (tensor(data[name]).to(dtype) for name in ("ref", "log_sum_sq_probs"))

    def outputs(values):
        return SimpleNamespace(
            log_probs=values, log_sum_sq_probs=squares, entropy=ones,
            mean_logits=0 * ones, is_top1=torch.zeros_like(ones, dtype=torch.bool),
        )  # fmt: skip

    values = {
        "accelerator": ONE, "model": StandIn(), "aux_loss_enabled": False,
        "ref_model": lambda **_: outputs(ref), "precompute_ref_logps": False,
        "ld_alpha": kw.get("ld"), "beta": kw.get("beta", 0.1), "loss_types": names,
        "loss_weights": kw.get("w") or [1.0] * len(names),
        "label_smoothing": kw.get("ls", 0.0), "use_weighting": kw.get("wpo", False),
        "f_divergence_type": kw.get("fd", "reverse_kl"),
        "f_alpha_divergence_coef": kw.get("fa", 0.5),
        "args": SimpleNamespace(
            discopop_tau=kw.get("tau", 0.05), gradient_checkpointing=False,
            gradient_checkpointing_kwargs=None,
        ),
        "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    for name, value in values.items():
        object.__setattr__(trainer, name, value)
    batch = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trainer._compute_loss(lambda **_: outputs(logprobs), batch, False)
    loss.backward()
    return {
        "loss_type": names,
        "kw": kw,
        "loss": loss.item(),
        "grad": logprobs.grad.tolist(),
        "metrics": last(trainer._metrics),
    }


def kto_case(data, name, kw):
    """Return one case of KTOTrainer._compute_loss, whose KL term is TRL's own too."""
    trainer = KTOTrainer.__new__(KTOTrainer)
    logprobs = tensor(data["logps"]).requires_grad_()
    ones = torch.ones_like(logprobs)
    mask, kl_mask = (torch.tensor(data[k]) for k in ("completion_mask", "kl_completion_mask"))

    def model(own, mismatched):
        """Return a stand-in that knows the KL completions by their tokens."""

        def call(input_ids, **_):
            values = mismatched if input_ids is kl_mask else own
            return SimpleNamespace(log_probs=values, entropy=ones, mean_logits=0 * ones)

        return call

    values = {
        "accelerator": ONE, "model": StandIn(), "aux_loss_enabled": False,
        "ref_model": model(tensor(data["ref"]), tensor(data["kl_ref"])),
        "precompute_ref_logps": False, "calculate_KL": name == "kto", "loss_type": name,
        "beta": kw.get("beta", 0.1), "desirable_weight": kw.get("dw", 1.0),
        "undesirable_weight": kw.get("uw", 1.0),
        "args": SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    for key, value in values.items():
        object.__setattr__(trainer, key, value)
    batch = {
        "input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "KL_input_ids": kl_mask, "KL_attention_mask": torch.ones_like(kl_mask),
        "KL_completion_mask": kl_mask, "label": torch.tensor(data["labels"]),
    }  # fmt: skip
    loss = trainer._compute_loss(model(logprobs, tensor(data["kl_logps"])), batch, False)
    loss.backward()
    return {
        "loss_type": name,
        "kw": kw,
        "loss": loss.item(),
        "grad": logprobs.grad.tolist(),
        "metrics": last(trainer._metrics),
    }


def kto(rng):
    """Return two batches of answers: good and bad ones with a KL above 0, good ones below 0."""
    batches = []
    for labels, shift in (([True, False, False, True, True], 1.0), ([True] * 3, -1.0)):
        masks = [], []
        for rows in masks:
            for start, stop in rng.integers([1, 4], [4, 9], (len(labels), 2)):
                rows.append([int(start <= place < stop) for place in range(9)])
        data = {"labels": labels, "completion_mask": masks[0], "kl_completion_mask": masks[1]}
        for name, rows in (("", masks[0]), ("kl_", masks[1])):
            live = np.array(rows)[:, 1:]
            ref = -rng.exponential(0.9, live.shape) - 1.0
            policy = ref + 0.5 * rng.standard_normal(live.shape) + (0.4 * shift if name else 0.0)
            data[f"{name}logps"] = (np.minimum(policy, 0.0) * live).tolist()
            data[f"{name}ref"] = (ref * live).tolist()
        batches.append(data | {"cases": [kto_case(data, name, kw) for name, kw in KTO_CASES]})
    return batches


def preference(rng):
    """Return the preference file: DPO's losses, ORPO's odds ratio, CPO's four losses, KTO's two."""
    mask = np.zeros((6, 9), int)
    for row, (start, stop) in enumerate([(2, 9), (1, 2), (3, 7), (2, 5), (1, 9), (3, 4)]):
        mask[row, start:stop] = 1
    live = mask[:, 1:]
    data = {
        "logps": (-rng.exponential(0.9, live.shape) * live).tolist(),
        "ref": (-rng.exponential(0.9, live.shape) * live).tolist(),
        "completion_mask": mask.tolist(),
        "log_sum_sq_probs": (-rng.exponential(0.5, live.shape)).tolist(),
    }
    smooth = {"exo_pair": {"ls": 0.001}, "robust": {"ls": 0.1}, "aot": {"ls": 0.1}}
    cases = [dpo_case(data, [name], smooth.get(name, {})) for name in DPO_NAMES]
    data["cases"] = cases + [dpo_case(data, names, kw) for names, kw in DPO_EXTRA]
    chosen, rejected = (-rng.exponential(0.8, 6) - 0.01 for _ in range(2))
    stub = SimpleNamespace(beta=0.2, accelerator=ONE)
    odds = ORPOTrainer.odds_ratio_loss(stub, tensor(chosen), tensor(rejected))[0]
    sides = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
    cpo = []
    for name in ("sigmoid", "hinge", "ipo", "simpo"):
        for alpha, smoothing in ((0.0, 0.0), (0.3, 0.1)):
            cfg = {
                "loss_type": name, "alpha": alpha, "label_smoothing": smoothing, "beta": 1.5,
                "simpo_gamma": 0.7,
            }  # fmt: skip
            stub = SimpleNamespace(**cfg, accelerator=ONE)
            losses = CPOTrainer.cpo_loss(stub, tensor(chosen), tensor(rejected))[0]
            cpo.append(cfg | {"losses": losses.tolist()})
    orpo = sides | {"beta": 0.2, "losses": odds.tolist()}
    return {"trl": trl.__version__, "dpo": data, "orpo": orpo, "cpo": cpo, "kto": kto(rng)}
