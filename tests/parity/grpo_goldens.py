"""What TRL computes of GRPO's losses on random inputs: `GRPOTrainer._compute_loss` itself."""

# pyright: reportMissingImports=false
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
import trl
from trl import GRPOTrainer
from trl_stubs import ONE, last, tensor

GRPO = {
    "loss": "dapo", "level": "token", "beta": 0.0, "eps": 0.2, "eps_hi": None, "delta": None,
    "bias_kl": True, "sapo_pos": 1.0, "sapo_neg": 1.05, "opsm": None, "rho": 1.0, "ga": 2,
    "spg": 2, "Lmax": 12,
}  # fmt: skip
EXTRA_GRPO = [
    {"eps_hi": 0.28}, {"delta": 1.4}, {"opsm": 0.02}, {"rho": 0.3}, {"ga": 3, "spg": 6},
    {"loss": "cispo", "eps_hi": 5.0}, {"loss": "grpo", "level": "sequence", "eps": 3e-4},
]  # fmt: skip
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OPTIONS = [
    {"rho": rho, "entropy_coef": coef} for rho in (0.0, 0.2, 0.4, 0.6, 0.8) for coef in (0.0, 0.1)
] + [
    {"loss": "grpo", "entropy_coef": 0.01}, {"loss": "bnpo", "entropy_coef": -0.02, "ga": 4},
    {"opsm": 0.0}, {"opsm": 0.0, "rho": 0.5, "beta": 0.05, "entropy_coef": 0.01},
    {"loss": "cispo"}, {"loss": "sapo", "sapo_pos": 0.7, "sapo_neg": 1.4, "beta": 0.05},
    {"loss": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5,
     "vespo_lambda_neg": 0.5},
    {"loss": "luspo", "level": "sequence", "delta": 1.6, "opsm": 0.01, "ga": 1, "spg": 4},
]  # fmt: skip


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
    logprobs = tensor(inputs["logps"]).requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        logprobs, tensor(inputs["ent"]), None,
    )  # fmt: skip
    trainer.args = SimpleNamespace(
        use_bias_correction_kl=cfg["bias_kl"], delta=cfg["delta"], steps_per_generation=cfg["spg"],
        sapo_temperature_pos=cfg["sapo_pos"], sapo_temperature_neg=cfg["sapo_neg"],
        vespo_k_pos=cfg.get("vespo_k_pos", 2.0), vespo_lambda_pos=cfg.get("vespo_lambda_pos", 3.0),
        vespo_k_neg=cfg.get("vespo_k_neg", 3.0), vespo_lambda_neg=cfg.get("vespo_lambda_neg", 2.0),
    )  # fmt: skip
    values = {
        "accelerator": ONE, "model": SimpleNamespace(training=True), "aux_loss_enabled": False,
        "top_entropy_quantile": cfg["rho"], "off_policy_mask_threshold": cfg["opsm"],
        "importance_sampling_level": cfg["level"], "beta": cfg["beta"], "epsilon_low": cfg["eps"],
        "epsilon_high": cfg["eps"] if cfg["eps_hi"] is None else cfg["eps_hi"],
        "loss_type": cfg["loss"], "use_vllm": ratio is not None,
        "vllm_importance_sampling_correction": ratio is not None,
        "max_completion_length": cfg["Lmax"], "current_gradient_accumulation_steps": cfg["ga"],
        "_entropy_bonus_enabled": cfg.get("entropy_coef", 0.0) != 0.0,
        "entropy_coef": cfg.get("entropy_coef", 0.0), "use_adaptive_entropy": False,
        "_metrics": {"train": defaultdict(list)},
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
    if "sampling" in inputs:
        batch["sampling_per_token_logps"] = tensor(inputs["sampling"])
    if ratio is not None:
        batch["importance_sampling_ratio"] = tensor(ratio)
    loss = trainer._compute_loss(None, batch)
    loss.backward()
    return {
        "cfg": cfg,
        "isr": None if ratio is None else ratio.tolist(),
        "loss": loss.item(),
        "grad": logprobs.grad.tolist(),
        "metrics": last(trainer._metrics),
    }


def grpo(rng):
    """Return the GRPO file."""
    inputs = grpo_inputs(rng)
    ratio = rng.uniform(0.5, 1.5, inputs["mask"].shape)
    cases = []
    for loss in LOSSES:
        for level in ("token", "sequence"):
            for beta, bias in ((0.0, True), (0.05, True), (0.05, False)):
                changes = {"loss": loss, "level": level, "beta": beta, "bias_kl": bias}
                cap = {"eps_hi": 1.3} if loss == "cispo" else {}
                cases.append(grpo_case(inputs, changes | cap, None))
    ratios = {"dapo": ratio[:, :1], "grpo": ratio, "vespo": ratio[:, :1]}
    cases += [grpo_case(inputs, {"loss": loss}, isr) for loss, isr in ratios.items()]
    cases += [grpo_case(inputs, changes, None) for changes in EXTRA_GRPO]
    return grpo_file(inputs, cases)


def grpo_file(inputs, cases):
    """Return a GRPO file."""
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    return {"trl": trl.__version__, "inputs": plain, "cases": cases}


def grpo_masked(rng):
    """Return the losses of a batch whose every completion was truncated, and so masked."""
    inputs = {k: v[:2] if isinstance(v, np.ndarray) else v for k, v in grpo_inputs(rng).items()}
    inputs |= {"mask": np.zeros_like(inputs["mask"]), "n_items": 0.0}
    levels = ("token", "sequence")
    changes = [{"loss": loss, "level": level, "beta": 0.05} for loss in LOSSES for level in levels]
    return grpo_file(inputs, [grpo_case(inputs, change, None) for change in changes])


def grpo_options(rng):
    """Return what the other files leave out: one masked row, and 21 tokens, of which the fifths
    are entropy quantiles that one token has."""
    inputs = grpo_inputs(rng)
    sampling = inputs["old"] + 0.1 * rng.standard_normal(inputs["old"].shape)
    inputs["mask"][[0, 4]] = [[0.0] * 8, [1.0] * 4 + [0.0] * 4]
    inputs |= {"n_items": float(inputs["mask"].sum()), "sampling": sampling}
    ratio = rng.uniform(0.5, 1.5, sampling.shape)
    ratios = [None, ratio, ratio[:, :1]]
    cases = [grpo_case(inputs, c, ratios[i % 3]) for i, c in enumerate(OPTIONS)]
    return grpo_file(inputs, cases)
