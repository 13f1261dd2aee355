"""Write what TRL computes on random inputs: `python tests/parity/make_goldens.py DIR`.

Runs TRL's own loss functions (trl 1.16.0, torch 2.13, float64, CPU), with a stand-in for the model
that hands over given log-probs; needs neither MLX nor this project. The format is run_goldens.py's.
"""

# pyright: reportMissingImports=false
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

ONE = SimpleNamespace(
    num_processes=1, device="cpu", sync_gradients=True, gather=lambda x: x,
    gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x,
    pad_across_processes=lambda x, dim, pad_index: x,
)  # fmt: skip
GRPO = {
    "loss": "dapo", "level": "token", "beta": 0.0, "eps": 0.2, "eps_hi": None, "delta": None,
    "bias_kl": True, "sapo_pos": 1.0, "sapo_neg": 1.05, "opsm": None, "rho": 1.0, "ga": 2,
    "spg": 2, "Lmax": 12,
}  # fmt: skip
EXTRA_GRPO = [
    {"eps_hi": 0.28}, {"delta": 1.4}, {"opsm": 0.02}, {"rho": 0.3}, {"ga": 3, "spg": 6},
    {"loss": "cispo", "eps_hi": 5.0}, {"loss": "grpo", "level": "sequence", "eps": 3e-4},
]  # fmt: skip
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
]  # fmt: skip


KTO_CASES = [
    ("kto", {}), ("kto", {"beta": 0.4}), ("kto", {"dw": 1.33, "uw": 0.7}),
    ("apo_zero_unpaired", {}), ("apo_zero_unpaired", {"beta": 0.4, "uw": 2.0}),
]  # fmt: skip


class StandIn(torch.nn.Module):
    """What DPOTrainer asks of a model besides its outputs."""

    is_gradient_checkpointing = False


def tensor(values):
    """Return float64."""
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def last(metrics):
    """Return the metrics that a trainer logged, null for NaN."""
    values = {name: float(value[-1]) for name, value in metrics["train"].items()}
    return {name: None if value != value else value for name, value in values.items()}


def grpo_inputs(rng):
    """Return the inputs that all GRPO cases share: seven rows of mixed lengths."""
    lengths = np.array([8, 1, 5, 3, 8, 2, 6])
    mask = (np.arange(8) < lengths[:, None]).astype(float)
    old = -rng.exponential(0.9, mask.shape)
    return {
        "logps": old + 0.25 * rng.standard_normal(mask.shape),
        "old": old,
        "ref": old + 0.3 * rng.standard_normal(mask.shape),
        "adv": rng.standard_normal(7),
        "mask": mask,
        "ent": rng.exponential(1.0, mask.shape),
        "n_items": float(mask.sum()),
    }


def grpo_case(inputs, changes, ratio):
    """Return one case of GRPOTrainer._compute_loss."""
    cfg = GRPO | changes
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    logps = tensor(inputs["logps"]).requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        logps, tensor(inputs["ent"]), None,
    )  # fmt: skip
    trainer.args = SimpleNamespace(
        use_bias_correction_kl=cfg["bias_kl"], delta=cfg["delta"], steps_per_generation=cfg["spg"],
        sapo_temperature_pos=cfg["sapo_pos"], sapo_temperature_neg=cfg["sapo_neg"],
        vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    )  # fmt: skip
    values = {
        "accelerator": ONE, "model": SimpleNamespace(training=True), "aux_loss_enabled": False,
        "top_entropy_quantile": cfg["rho"], "off_policy_mask_threshold": cfg["opsm"],
        "importance_sampling_level": cfg["level"], "beta": cfg["beta"], "epsilon_low": cfg["eps"],
        "epsilon_high": cfg["eps"] if cfg["eps_hi"] is None else cfg["eps_hi"],
        "loss_type": cfg["loss"], "use_vllm": ratio is not None,
        "vllm_importance_sampling_correction": ratio is not None,
        "max_completion_length": cfg["Lmax"], "current_gradient_accumulation_steps": cfg["ga"],
        "_entropy_bonus_enabled": False, "_metrics": {"train": defaultdict(list)},
    }  # fmt: skip
    for name, value in values.items():
        object.__setattr__(trainer, name, value)
    width = len(inputs["mask"][0])
    prompt = torch.ones(len(inputs["mask"]), 1, dtype=torch.long)
    batch = {
        "prompt_ids": prompt, "prompt_mask": prompt,
        "completion_ids": torch.ones(len(prompt), width, dtype=torch.long),
        "completion_mask": tensor(inputs["mask"]), "advantages": tensor(inputs["adv"]),
        "old_per_token_logps": tensor(inputs["old"]), "ref_per_token_logps": tensor(inputs["ref"]),
        "num_items_in_batch": tensor(inputs["n_items"]),
    }  # fmt: skip
    if ratio is not None:
        batch["importance_sampling_ratio"] = tensor(ratio)
    loss = trainer._compute_loss(None, batch)
    loss.backward()
    return {
        "cfg": cfg,
        "isr": None if ratio is None else ratio.tolist(),
        "loss": loss.item(),
        "grad": logps.grad.tolist(),
        "metrics": last(trainer._metrics),
    }


def grpo(rng):
    """Return the GRPO file."""
    inputs = grpo_inputs(rng)
    ratio = rng.uniform(0.5, 1.5, inputs["mask"].shape)
    cases = []
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"):
        for level in ("token", "sequence"):
            for beta, bias in ((0.0, True), (0.05, True), (0.05, False)):
                changes = {"loss": loss, "level": level, "beta": beta, "bias_kl": bias}
                cap = {"eps_hi": 1.3} if loss == "cispo" else {}
                cases.append(grpo_case(inputs, changes | cap, None))
    ratios = {"dapo": ratio[:, :1], "grpo": ratio, "vespo": ratio[:, :1]}
    cases += [grpo_case(inputs, {"loss": loss}, isr) for loss, isr in ratios.items()]
    cases += [grpo_case(inputs, changes, None) for changes in EXTRA_GRPO]
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    return {"trl": trl.__version__, "inputs": plain, "cases": cases}


def dpo_case(data, names, kw):
    """Return one case of DPOTrainer._compute_loss with precomputed reference log-probs."""
    trainer = DPOTrainer.__new__(DPOTrainer)
    # TRL's alpha divergence takes no float64.
    dtype = torch.float32 if kw.get("fd") == "alpha_divergence" else torch.float64
    logps = tensor(data["logps"]).to(dtype).requires_grad_()
    mask = torch.tensor(data["completion_mask"])
    ones = torch.ones_like(logps)
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
        "f_divergence_type": kw.get("fd", "reverse_kl"), "f_alpha_divergence_coef": 0.5,
        "args": SimpleNamespace(
            discopop_tau=kw.get("tau", 0.05), gradient_checkpointing=False,
            gradient_checkpointing_kwargs=None,
        ),
        "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    for name, value in values.items():
        object.__setattr__(trainer, name, value)
    batch = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trainer._compute_loss(lambda **_: outputs(logps), batch, False)
    loss.backward()
    return {
        "loss_type": names,
        "kw": kw,
        "loss": loss.item(),
        "grad": logps.grad.tolist(),
        "metrics": last(trainer._metrics),
    }


def kto_case(data, name, kw):
    """Return one case of KTOTrainer._compute_loss, whose KL term is TRL's own too."""
    trainer = KTOTrainer.__new__(KTOTrainer)
    logps = tensor(data["logps"]).requires_grad_()
    ones = torch.ones_like(logps)
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
    loss = trainer._compute_loss(model(logps, tensor(data["kl_logps"])), batch, False)
    loss.backward()
    return {
        "loss_type": name,
        "kw": kw,
        "loss": loss.item(),
        "grad": logps.grad.tolist(),
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


def main(folder):
    """Write both files, with 9 significant digits: a hundredth of the bar."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20_26)
    for name, make in (("grpo", grpo), ("preference", preference)):
        text = json.dumps(rounded(make(rng)), separators=(",", ":"))
        (folder / f"{name}.json").write_text(text + "\n")


def rounded(value):
    """Round every number of a tree to 9 significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/parity/make_goldens.py DIR")
    main(Path(sys.argv[1]))
