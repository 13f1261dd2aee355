"""Make `curve_goldens/`: whole training runs by TRL 1.16.0's own trainers on a small model.

    pip install trl==1.16.0 torch==2.13.0 peft==0.21.2 transformers==5.23.0
    python tests/parity/make_curves.py [--out DIR] [RUN ...]

Runs on CPU in float32; needs neither MLX nor this project. Model, adapters, rows and rollouts are
drawn from seeds (`curve_inputs.py`). The trainers are subclassed to note what `compute_loss` is
given, and GRPO takes its fixed rollouts through `rollout_func`; nothing else is replaced.

Writes `model/`, `init_lora.safetensors` and, a run, two files for `run_curves.py` to replay:
`RUN.json` (settings; a step: loss, gradient norm before clipping, learning rate, in `logs` what TRL
logs of `METRICS` and, a micro-batch, the `inputs` of `compute_loss`; GRPO also `rollout`, each
line's row and number in its group, and `rewards`) and `RUN.safetensors` (`final.NAME`: adapters
after the last step, in PEFT's layout).
"""

# pyright: reportMissingImports=false
# (torch, trl and peft are no dependencies)

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import curve_inputs  # noqa: E402

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
SETTINGS = {
    "gradient_accumulation_steps": 1, "max_steps": 8, "learning_rate": 1e-3,
    "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "bf16": False, "fp16": False, "use_cpu": True,
    "gradient_checkpointing": False, "disable_tqdm": True, "seed": 42,
}  # fmt: skip
OFFLINE = SETTINGS | {
    "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "max_length": 128,
}  # fmt: skip
DPO = OFFLINE | {"beta": 0.1, "loss_type": ["sigmoid"]}
SIMPO = OFFLINE | {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.5}
GRPO = SETTINGS | {
    "per_device_train_batch_size": 8, "shuffle_dataset": False, "num_iterations": 1, "epsilon": 0.2,
    "num_generations": curve_inputs.GENERATIONS, "temperature": 1.0, "scale_rewards": "group",
    "max_completion_length": curve_inputs.MAX_COMPLETION_LENGTH, "use_bias_correction_kl": True,
    "steps_per_generation": 1,
}  # fmt: skip
BASE, INITIAL = "base model, adapter disabled", "frozen copy of the initial adapter"
RUNS = {
    "sft": (SFTTrainer, SFTConfig, OFFLINE, BASE),
    "dpo_sigmoid": (DPOTrainer, DPOConfig, DPO, BASE),
    "dpo_sigmoid_refadapter": (DPOTrainer, DPOConfig, DPO, INITIAL),
    "orpo": (ORPOTrainer, ORPOConfig, OFFLINE | {"beta": 0.1}, BASE),
    "simpo_alpha0": (CPOTrainer, CPOConfig, SIMPO | {"cpo_alpha": 0.0}, BASE),
    "simpo_alpha1": (CPOTrainer, CPOConfig, SIMPO | {"cpo_alpha": 1.0}, BASE),
}
for loss_type in ("dapo", "grpo"):
    for beta in (0.0, 0.04):
        arguments = GRPO | {"loss_type": loss_type, "beta": beta}
        RUNS[f"grpo_{loss_type}_beta{beta:g}"] = (GRPOTrainer, GRPOConfig, arguments, BASE)
# Ratios other than 1: the batch is trained on twice, in two micro-batches.
TWICE = GRPO | {
    "loss_type": "dapo", "beta": 0.04, "num_iterations": 2, "gradient_accumulation_steps": 2,
    "steps_per_generation": 2, "per_device_train_batch_size": 4,
}  # fmt: skip
RUNS["grpo_dapo_beta0.04_twice"] = (GRPOTrainer, GRPOConfig, TWICE, BASE)
METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
COLUMNS = {SFTTrainer: ["prompt", "completion"], GRPOTrainer: ["prompt"]}


class Curve(TrainerCallback):
    """Notes what the trainer logs and what its losses are given, step by step."""

    def __init__(self, rollouts):
        self.rollouts = rollouts
        self.steps = []
        self.micro = []
        self.tensors = {}

    def note(self, inputs):
        """Note the inputs of one micro-batch; float arrays go to the tensors."""
        plain = {}
        for name, value in inputs.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 2:
                key = f"step{len(self.steps) + 1}.micro{len(self.micro) + 1}.{name}"
                self.tensors[key] = value.clone().contiguous()
                plain[name] = {"tensor": key}
            elif isinstance(value, torch.Tensor):
                plain[name] = value.int().tolist() if value.dtype == torch.bool else value.tolist()
        entry: dict[str, object] = {"inputs": plain}
        if "completion_mask" in plain and "advantages" in plain:
            rows = zip(plain["completion_ids"], plain["completion_mask"], strict=True)
            found = [self.rollouts.find(ids[: sum(mask)]) for ids, mask in rows]
            entry["rollout"] = [[row, k] for row, k in found]
            entry["rewards"] = [self.rollouts.rewards[row][k] for row, k in found]
        self.micro.append(entry)

    def on_log(self, args, state, control, logs=None, **_):
        """Close a step."""
        if logs is None or "grad_norm" not in logs:
            return  # the summary at the end
        step = {"step": state.global_step}
        step |= {name: logs[name] for name in ("loss", "grad_norm", "learning_rate")}
        step["logs"] = {name: logs[name] for name in METRICS if name in logs}
        self.steps.append(step | {"micro": self.micro})
        self.micro = []


def noting(kind, curve):
    """Return a subclass of a trainer that tells `curve` what its loss is given."""

    class Noting(kind):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                curve.note(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    Noting.__name__ = kind.__name__
    return Noting


def put_adapter(model, initial):
    """Set the trainable adapter of a PEFT model and its frozen copy, if any."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(initial[plain_name(name)])


def plain_name(name):
    """Return a PEFT tensor's name without its wrappers."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".default.", ".").replace(".ref.", ".")


def build(name, out, curve, initial, rows):
    """Return TRL's trainer for a run, on the given initial adapter."""
    kind, config, settings, reference = RUNS[name]
    model = AutoModelForCausalLM.from_pretrained(
        out / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    shape = curve_inputs.LORA
    peft = LoraConfig(
        r=shape["r"], lora_alpha=shape["lora_alpha"], lora_dropout=0.0, bias="none",
        target_modules=shape["target_modules"], task_type="CAUSAL_LM",
    )  # fmt: skip
    extra = {"peft_config": peft}
    if reference == INITIAL:
        model, extra = get_peft_model(model, peft), {}
        put_adapter(model, initial)
    if kind is GRPOTrainer:
        rollouts = curve.rollouts
        extra |= {"reward_funcs": [rollouts.fixed_reward], "rollout_func": rollouts.generate}
    columns = COLUMNS.get(kind, ["prompt", "chosen", "rejected"])
    chosen = [{c: row["chosen" if c == "completion" else c] for c in columns} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        trainer = noting(kind, curve)(
            model=model, args=config(output_dir=folder, **settings), callbacks=[curve],
            train_dataset=datasets.Dataset.from_list(chosen), processing_class=tokenizer, **extra,
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    put_adapter(trainer.model, initial)
    return trainer


def run(name, out):
    """Train one run and write its files."""
    kind, _, settings, reference = RUNS[name]
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    rows = curve_inputs.rows()
    curve = Curve(curve_inputs.Rollouts(rows, tokenizer))
    initial = load_file(out / "init_lora.safetensors")
    trainer = build(name, out, curve, initial, rows)
    trainer.train()
    final = {
        plain_name(n): p.detach().clone().contiguous()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    assert len(curve.steps) == settings["max_steps"]
    assert final.keys() == initial.keys()
    save_file(
        {f"final.{n}": p for n, p in final.items()} | curve.tensors, out / f"{name}.safetensors"
    )
    head = {
        "case": name, "trainer": f"{kind.__module__}.{kind.__name__}",
        "versions": {"trl": trl.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "lora": curve_inputs.LORA | {"reference": reference},
        "explicit_args": settings, "tensor_names": list(final),
    }  # fmt: skip
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    steps = ",\n".join(json.dumps(step, separators=(",", ":")) for step in curve.steps)
    text = "{\n" + ",\n".join(lines) + ',\n"steps": [\n' + steps + "\n]\n}\n"
    (out / f"{name}.json").write_text(text)
    ends = [f"{step['loss']:.6f} / {step['grad_norm']:.4f}" for step in curve.steps]
    print(f"{name:28} loss / gradient norm {ends[0]} to {ends[-1]}", flush=True)


def main():
    """Write the goldens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "curve_goldens")
    parser.add_argument("runs", nargs="*", choices=[*RUNS, []])
    args = parser.parse_args()
    if trl.__version__ != "1.16.0":
        raise SystemExit(f"TRL 1.16.0 is needed, this is {trl.__version__}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    curve_inputs.write_model(args.out / "model")
    save_file(
        {name: torch.from_numpy(array) for name, array in curve_inputs.initial_adapter().items()},
        args.out / "init_lora.safetensors",
    )
    for name in args.runs or RUNS:
        run(name, args.out)


if __name__ == "__main__":
    main()
