"""The run's settings as Structs: every key that a recipe may hold, with its default.

Names follow TRL where TRL has the knob. `protocol/config/load.py` reads TOML and flags into these,
and refuses unknown keys. A field's comment is its help text.
"""

from typing import Any, Literal

import msgspec


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section of a recipe."""


class RunSettings(Section, frozen=True, kw_only=True):
    """The run itself."""

    name: str = ""  # folder under `dir`; empty: made from the recipe's name and the time
    dir: str = "runs"  # where run folders are made
    seed: int = 42  # of data order, adapters, sampling
    resume: str = ""  # run folder to go on with, from its newest checkpoint
    save_steps: int = 50  # steps between checkpoints; one is always saved at the end; 0: only then
    save_total_limit: int = 2  # checkpoints kept
    log_completions: int = 4  # completions a step written to rollouts.jsonl with text; -1: all


class LoraSettings(Section, frozen=True, kw_only=True):
    """Adapters, as mlx-lm configures them."""

    rank: int = 16
    scale: float = 2.0  # alpha / rank
    dropout: float = 0.0
    num_layers: int = -1  # last layers that get adapters; -1: all
    keys: list[str] | None = None  # module names in a layer; None: every linear layer


class ModelSettings(Section, frozen=True, kw_only=True):
    """The policy."""

    path: str = ""  # local folder or hub id, in mlx-lm's format
    revision: str | None = None
    adapter_path: str = ""  # start from this adapter (mlx-lm's format)
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    lora: LoraSettings = LoraSettings()
    quantize_bits: Literal[0, 4, 8] = 0  # quantise a plain base at load
    quantize_group_size: int = 64
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # as stored; CPU: float32
    chat_template: str = ""  # file with a Jinja template that replaces the tokenizer's
    reference: str = "initial"  # "initial", "base", or a path to a model or an adapter


class DataSettings(Section, frozen=True, kw_only=True):
    """The dataset."""

    path: str = ""  # hub id, file (json, jsonl, csv, parquet), or folder
    name: str | None = None  # hub configuration
    split: str = "train"
    eval_path: str = ""  # empty: `eval_split` of `path`
    eval_split: str = ""  # empty: no evaluation, unless eval_path or eval_rows is set
    eval_rows: int = 0  # rows held out of the training rows; 0: none
    streaming: bool = False
    shuffle_buffer: int = 10_000  # rows, for streaming datasets
    columns: dict[str, str] = {}  # our name = the dataset's name
    prepare: str = ""  # "file.py:function" or "package.module:function"; row to row or None
    system_prompt: str = ""  # put before every conversation that has none
    max_prompt_length: int | None = None  # tokens
    overlong_prompts: Literal["drop", "error"] = "drop"
    max_length: int | None = 1024  # tokens of prompt and completion (offline)
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"  # of rows over max_length
    order: Literal[  # torch_randperm: as TRL with the same seed
        "shuffled", "sequential", "length_grouped", "torch_randperm"
    ] = "shuffled"
    on_bad_row: Literal["drop", "error"] = "drop"  # error: stop at the first
    max_rows: int | None = None


class RewardSettings(Section, frozen=True, kw_only=True):
    """What completions are worth."""

    functions: list[str] = []  # "pkg.mod:fn", "file.py:fn", "zmq://host:port"
    reward_weights: list[float] | None = None
    reward_timeout_s: float = 60.0
    workers: int = 1  # local reward servers
    max_none_batches: int = 3  # stop after so many batches without any reward


class SamplingSettings(Section, frozen=True, kw_only=True):
    """How completions are sampled."""

    num_generations: int = 8
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None


class GrpoSettings(Section, frozen=True, kw_only=True):
    """The GRPO family; TRL 1.16.0's names and defaults."""

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = (
        "dapo"
    )
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    num_iterations: int = 1
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    mask_truncated_completions: bool = False
    top_entropy_quantile: float = 1.0
    use_bias_correction_kl: bool = True
    off_policy_mask_threshold: float | None = None
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    old_logprobs: Literal["sampler", "recompute"] = "sampler"
    importance_sampling_correction: bool = False  # needs old_logprobs = "recompute"
    importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "sequence_mask"
    importance_sampling_clip_max: float = 3.0
    importance_sampling_clip_min: float | None = None
    zero_advantage_step: bool = False  # TRL steps even if every advantage is zero


class PreferenceSettings(Section, frozen=True, kw_only=True):
    """Preference losses; TRL 1.16.0's names and defaults."""

    method: Literal["dpo", "cpo", "simpo", "orpo", "kto"] = "dpo"
    loss_type: list[str] = msgspec.field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    alpha: float = 0.0  # AlphaPO
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_free: bool = False
    precompute_ref_log_probs: bool = False  # before training; kept beside the datasets cache


class SftSettings(Section, frozen=True, kw_only=True):
    """Plain fine-tuning."""

    completion_only_loss: bool | None = None  # None: where rows have a prompt; true: messages too


class OptimizerSettings(Section, frozen=True, kw_only=True):
    """AdamW with bias correction, as TRL configures it."""

    learning_rate: float = 1e-6  # for full fine-tuning; adapters take 10 to 100 times as much
    lr_scheduler_type: Literal["linear", "constant", "cosine"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


class TrainSettings(Section, frozen=True, kw_only=True):
    """The step."""

    batch_size: int = 8  # groups (GRPO) or rows (offline) an optimiser batch
    micro_batch_size: int = 1  # groups (GRPO) or rows (offline) a forward pass
    max_steps: int = -1  # batches; -1: `num_train_epochs`
    num_train_epochs: float = 1.0
    head: Literal["chunked", "full"] = "chunked"
    shared_prompt: Literal["auto", "on", "off"] = "auto"  # GRPO: prompts once; auto: not on CUDA
    gradient_checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on GPU
    length_bucket: int = 32  # padded lengths are multiples of this


class QueueSettings(Section, frozen=True, kw_only=True):
    """Asynchrony."""

    max_staleness: int = 1  # eta, in batches; 0: the synchronous loop
    lease_s: float = 120.0
    max_attempts: int = 3


class ActorSettings(Section, frozen=True, kw_only=True):
    """The local actors."""

    count: int = 1
    max_concurrent_completions: int = 32  # sampled at once by one actor
    prefill_step_size: int = 2048
    heartbeat_s: float = 2.0
    max_restarts: int = 10


class EvalSettings(Section, frozen=True, kw_only=True):
    """Evaluation of held-out rows."""

    steps: int = 0  # steps between evaluations; 0: at the start and at the end
    at_start: bool = True
    batch_size: int = 8  # rows a forward pass (offline)
    generate: bool = False  # offline runs: also sample answers
    max_completion_length: int | None = None  # None: as in training; offline: 256


class TransportSettings(Section, frozen=True, kw_only=True):
    """Sockets."""

    bind: str = ""  # tcp://host:port for remote actors; empty: ipc only
    keys: str = ""  # folder made by launch/keys.py; required off loopback
    max_message_mb: int = 64


class GrpoRun(Section, frozen=True, kw_only=True):
    """A recipe of launch/grpo.py."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    rewards: RewardSettings = RewardSettings()
    sampling: SamplingSettings = SamplingSettings()
    objective: GrpoSettings = GrpoSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    queue: QueueSettings = QueueSettings()
    actors: ActorSettings = ActorSettings()
    eval: EvalSettings = EvalSettings()
    transport: TransportSettings = TransportSettings()


class PreferenceRun(Section, frozen=True, kw_only=True):
    """A recipe of launch/preference.py."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    objective: PreferenceSettings = PreferenceSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()


class SftRun(Section, frozen=True, kw_only=True):
    """A recipe of launch/sft.py."""

    run: RunSettings = RunSettings()
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    objective: SftSettings = SftSettings()
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=2e-5)
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()


class PairsSettings(Section, frozen=True, kw_only=True):
    """What becomes a pair."""

    mode: Literal["best_worst", "given"] = "best_worst"  # of a group; or the dataset's answer
    answer_column: str = "answer"  # mode "given": chosen; rejected is the base model's own answer
    output: str = ""  # JSONL file; empty: pairs.jsonl in the run's folder


class PairsRun(GrpoRun, frozen=True, kw_only=True):
    """A recipe of launch/pairs.py: GRPO's without training; `train.batch_size` prompts at a time.

    Mode "given" samples one answer a prompt, without adapter, and needs no reward function.
    """

    pairs: PairsSettings = PairsSettings()


AnyRun = GrpoRun | PreferenceRun | SftRun


def builtins(section: Section) -> dict[str, Any]:
    """Return a section as plain values, for messages and files."""
    return msgspec.to_builtins(section)
