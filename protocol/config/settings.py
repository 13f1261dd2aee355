"""The recipe of each program as a Struct: every key with its type, bounds, default and meaning.

A program's Struct holds the sections that it reads, so that a key of another program is an unknown
one. Names follow TRL where TRL has the setting. Rules that span keys are in `checks.py`.
"""

from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, field, to_builtins

from protocol.config.fields import (
    BelowOne,
    Count,
    CountOrAll,
    DataPath,
    FunctionName,
    LocalPath,
    NonNegative,
    PathOrId,
    Positive,
    PositiveInt,
    Section,
    doc,
)
from protocol.config.objective_settings import GrpoSettings, PreferenceSettings, SftSettings
from protocol.config.online_settings import (
    ActorSettings,
    GrpoActors,
    GrpoRewards,
    PairsSettings,
    QueueSettings,
    RewardSettings,
    SamplingSettings,
    TransportSettings,
)

SectionT = TypeVar("SectionT", bound=Section)


class RunSettings(Section, frozen=True, kw_only=True):
    """The run itself."""

    name: Annotated[str, doc("Folder under `run.dir`; empty: the recipe's name and the time.")] = ""
    dir: Annotated[str, doc("Where run folders are made.")] = "runs"
    seed: Annotated[
        int, Meta(ge=0, lt=2**32), doc("Seed of data order, new adapters, dropout and sampling.")
    ] = 42
    restart_window_s: Annotated[
        Positive, doc("Seconds within which restarts of a process are counted.")
    ] = 3600.0


class TrainingRunSettings(RunSettings, frozen=True, kw_only=True):
    """The run itself and its checkpoints."""

    resume: Annotated[str, doc("Run folder to continue, from its newest checkpoint.")] = ""
    save_steps: Annotated[
        Count, doc("Steps between checkpoints; 0: only the one that every run saves at its end.")
    ] = 50
    save_total_limit: Annotated[PositiveInt, doc("How many checkpoints to keep.")] = 2
    max_restarts: Annotated[
        Count, doc("Restarts of the learner, within `run.restart_window_s`, before the run ends.")
    ] = 10
    stop_timeout_s: Annotated[
        Positive,
        doc(
            "Seconds that the learner has to finish its step and save when its launcher is gone, "
            "or no actor is left; then it is killed."
        ),
    ] = 300.0


class GrpoRunSettings(TrainingRunSettings, frozen=True, kw_only=True):
    """The run itself, its checkpoints and its log of completions."""

    deterministic: Annotated[
        bool,
        doc(
            "Sample in fixed shapes, in float32: a completion's tokens and log-probs are the same "
            "bits whatever is sampled beside it, by however many actors."
        ),
    ] = False
    journal: Annotated[
        Literal["all", "recovery"],
        doc(
            "How much of the journal is kept: all of it, for `launch/replay.py`; or what a "
            "recovery from the kept checkpoints needs."
        ),
    ] = "all"
    log_completions: Annotated[
        int,
        Meta(ge=-1),
        doc("Completions per group written to rollouts.jsonl with their text; -1: all."),
    ] = 4


class LoraSettings(Section, frozen=True, kw_only=True):
    """Adapters, as mlx-lm configures them."""

    rank: Annotated[PositiveInt, doc("Rank of each adapter.")] = 16
    scale: Annotated[float, doc("Factor of the adapter's output: alpha / rank.")] = 2.0
    dropout: Annotated[BelowOne, doc("Share of the adapter's inputs dropped in training.")] = 0.0
    num_layers: Annotated[CountOrAll, doc("Last layers that get adapters; -1: all.")] = -1
    keys: Annotated[
        Annotated[list[str], Meta(min_length=1)] | None,
        doc("Names of the modules in a layer that get adapters; none: every linear layer."),
    ] = None


class ModelSource(Section, frozen=True, kw_only=True):
    """The model that is loaded."""

    path: Annotated[PathOrId, doc("The model: a local folder or hub id, in mlx-lm's format.")] = ""
    revision: Annotated[str | None, doc("Branch, tag or commit on the hub; none: default.")] = None
    adapter_path: Annotated[
        LocalPath, doc("Adapter to start from, in mlx-lm's format; empty: new adapters.")
    ] = ""
    fine_tune_type: Annotated[
        Literal["lora", "dora", "full"], doc("What is trained: adapters, or all weights.")
    ] = "lora"
    quantize_bits: Annotated[
        Literal[0, 4, 8], doc("Bits to quantise an unquantised model to at load; 0: as stored.")
    ] = 0
    quantize_group_size: Annotated[
        Literal[32, 64, 128], doc("Weights that share a scale, with `model.quantize_bits`.")
    ] = 64
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        doc("Type of the weights; auto: as stored, but float32 on a CPU."),
    ] = "auto"
    chat_template: Annotated[LocalPath, doc("Jinja file to use instead of the tokenizer's.")] = ""


class ModelSettings(ModelSource, frozen=True, kw_only=True):
    """The policy; learner and actors load it alike."""

    lora: LoraSettings = LoraSettings()


class PolicySettings(ModelSettings, frozen=True, kw_only=True):
    """The policy and its reference."""

    reference: Annotated[
        PathOrId,
        Meta(extra={"not_paths": ("initial", "base")}),
        doc(
            "The frozen reference of the loss: `initial`, the policy as it starts; `base`, the "
            "model without adapter; or a path to a model or an adapter."
        ),
    ] = "initial"


class DataSettings(Section, frozen=True, kw_only=True):
    """The dataset."""

    path: Annotated[
        DataPath,
        Meta(min_length=1),
        doc("Rows: a hub id, file (json, jsonl, csv, parquet), folder, or `file.py:function`."),
    ] = ""
    name: Annotated[str | None, doc("Configuration of a hub dataset; none: its default.")] = None
    split: Annotated[str, doc("Split of the dataset to use.")] = "train"
    eval_rows: Annotated[
        Count, doc("Rows of `data.path` that are held out and never trained on; 0: none.")
    ] = 0
    streaming: Annotated[bool, doc("Read rows as they come; needs `train.max_steps`.")] = False
    shuffle_buffer: Annotated[PositiveInt, doc("Rows among which a stream is shuffled.")] = 10_000
    columns: Annotated[dict[str, str], doc("Renamed columns: our name = the dataset's name.")] = (
        field(default_factory=dict[str, str])
    )
    prepare: Annotated[
        FunctionName,
        doc("`file.py:function` or `package.module:function` that changes a row; None drops it."),
    ] = ""
    system_prompt: Annotated[str, doc("System message where a conversation has none.")] = ""
    order: Annotated[
        Literal["shuffled", "sequential", "length_grouped", "torch_randperm"],
        doc("Order of rows; torch_randperm: that of TRL with the same seed."),
    ] = "shuffled"
    on_bad_row: Annotated[
        Literal["drop", "error"], doc("Rows that cannot be used: drop them, or stop at the first.")
    ] = "drop"
    max_rows: Annotated[PositiveInt | None, doc("Most rows to use; none: all of them.")] = None


EvalPath = Annotated[DataPath, doc("Held-out rows, as for `data.path`; empty: no other dataset.")]
EvalSplit = Annotated[str, doc("Split of `data.eval_path`, else of `data.path`, that is held out.")]


class PromptData(DataSettings, frozen=True, kw_only=True):
    """The dataset of prompts."""

    max_prompt_length: Annotated[
        PositiveInt | None, doc("Most tokens of a prompt; none: no limit.")
    ] = None
    overlong_prompts: Annotated[
        Literal["drop", "error"], doc("Prompts over `data.max_prompt_length`: drop them, or stop.")
    ] = "drop"


class GrpoData(PromptData, frozen=True, kw_only=True):
    """The dataset of prompts, and held-out prompts."""

    eval_path: EvalPath = ""
    eval_split: EvalSplit = ""


class ExampleData(DataSettings, frozen=True, kw_only=True):
    """The dataset of examples, and held-out examples."""

    eval_path: EvalPath = ""
    eval_split: EvalSplit = ""
    max_length: Annotated[
        PositiveInt | None, doc("Most tokens of prompt and completion together; none: no limit.")
    ] = 1024
    truncation_mode: Annotated[
        Literal["keep_start", "keep_end"], doc("Which end of longer examples is kept.")
    ] = "keep_start"


class OptimizerSettings(Section, frozen=True, kw_only=True):
    """AdamW with bias correction, as TRL configures it."""

    learning_rate: Annotated[
        Positive,
        doc(
            "Peak learning rate. The default suits full fine-tuning; adapters take 10 to 100 times "
            "as much."
        ),
    ] = 1e-6
    lr_scheduler_type: Annotated[
        Literal["linear", "constant", "cosine"],
        doc("What follows the warm-up: linear or cosine decay to 0, or the same rate."),
    ] = "linear"
    warmup_steps: Annotated[Count, doc("Optimiser steps in which the rate rises from 0.")] = 0
    weight_decay: Annotated[NonNegative, doc("Decoupled weight decay.")] = 0.0
    adam_beta1: Annotated[BelowOne, doc("Decay of the mean of gradients.")] = 0.9
    adam_beta2: Annotated[BelowOne, doc("Decay of the mean of squared gradients.")] = 0.999
    adam_epsilon: Annotated[Positive, doc("Added to Adam's denominator.")] = 1e-8
    max_grad_norm: Annotated[Positive, doc("Norm that gradients are clipped to.")] = 1.0


class BatchSettings(Section, frozen=True, kw_only=True):
    """The size and number of batches."""

    batch_size: Annotated[PositiveInt, doc("Prompts (groups) or, offline, examples per batch.")] = 8
    max_steps: Annotated[CountOrAll, doc("Batches; -1: as `train.num_train_epochs` gives.")] = -1
    num_train_epochs: Annotated[Positive, doc("Passes over the rows.")] = 1.0


class TrainSettings(BatchSettings, frozen=True, kw_only=True):
    """The training step."""

    micro_batch_size: Annotated[PositiveInt, doc("Groups or, offline, examples per pass.")] = 1
    head: Annotated[
        Literal["chunked", "full"],
        doc("How log-probs are computed: in chunks that never hold all logits, or from all."),
    ] = "chunked"
    gradient_checkpointing: Annotated[
        bool, doc("Recompute each layer in the backward pass: less memory, more time.")
    ] = False
    compile: Annotated[Literal["auto", "on", "off"], doc("Compile steps; auto: on GPU.")] = "auto"
    device: Annotated[
        Count | None, doc("NVIDIA GPU of the learner, counted from 0; none: the first.")
    ] = None
    length_bucket: Annotated[
        PositiveInt, doc("Padded lengths are multiples of this, so that steps share shapes.")
    ] = 32


class GrpoTrain(TrainSettings, frozen=True, kw_only=True):
    """The training step."""

    shared_prompt: Annotated[
        Literal["auto", "on", "off"],
        doc("Run a group's prompt through the model once for all completions; auto: not on CUDA."),
    ] = "auto"


class EvalSettings(Section, frozen=True, kw_only=True):
    """Evaluation of held-out rows."""

    steps: Annotated[
        Count, doc("Steps between evaluations; 0: only at the start and at the end.")
    ] = 0
    at_start: Annotated[bool, doc("Evaluate before the first step.")] = True
    max_completion_length: Annotated[
        PositiveInt | None,
        doc("Most tokens of a sampled answer; none: as in training (GRPO), or 256 (offline)."),
    ] = None


class OfflineEval(EvalSettings, frozen=True, kw_only=True):
    """Evaluation of held-out rows."""

    batch_size: Annotated[PositiveInt, doc("Examples per forward pass.")] = 8
    generate: Annotated[bool, doc("Also sample answers, to rollouts.jsonl.")] = False


class GrpoRun(Section, frozen=True, kw_only=True):
    """A recipe of launch/grpo.py: sample completions, score them, train on them."""

    run: GrpoRunSettings = GrpoRunSettings()
    model: PolicySettings = PolicySettings()
    data: GrpoData = GrpoData()
    rewards: GrpoRewards = GrpoRewards()
    sampling: SamplingSettings = SamplingSettings()
    objective: GrpoSettings = GrpoSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: GrpoTrain = GrpoTrain()
    queue: QueueSettings = QueueSettings()
    actors: GrpoActors = GrpoActors()
    eval: EvalSettings = EvalSettings()
    transport: TransportSettings = TransportSettings()


class PairsRun(Section, frozen=True, kw_only=True):
    """A recipe of launch/pairs.py: sample completions and write preference pairs."""

    run: RunSettings = RunSettings()
    model: ModelSource = ModelSource()
    data: PromptData = PromptData()
    rewards: RewardSettings = RewardSettings()
    sampling: SamplingSettings = SamplingSettings()
    train: BatchSettings = BatchSettings()
    queue: QueueSettings = QueueSettings()
    actors: ActorSettings = ActorSettings()
    transport: TransportSettings = TransportSettings()
    pairs: PairsSettings = PairsSettings()


class PreferenceRun(Section, frozen=True, kw_only=True):
    """A recipe of launch/preference.py: train on preference pairs or judged answers."""

    run: TrainingRunSettings = TrainingRunSettings()
    model: PolicySettings = PolicySettings()
    data: ExampleData = ExampleData()
    objective: PreferenceSettings = PreferenceSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    eval: OfflineEval = OfflineEval()


class SftRun(Section, frozen=True, kw_only=True):
    """A recipe of launch/sft.py: plain fine-tuning."""

    run: TrainingRunSettings = TrainingRunSettings()
    model: ModelSettings = ModelSettings()
    data: ExampleData = ExampleData()
    objective: SftSettings = SftSettings()
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=2e-5)
    train: TrainSettings = TrainSettings()
    eval: OfflineEval = OfflineEval()


OnlineRun = GrpoRun | PairsRun
OfflineRun = PreferenceRun | SftRun
TrainingRun = GrpoRun | OfflineRun
AnyRun = OnlineRun | OfflineRun
PROGRAMS: dict[type[AnyRun], str] = {
    GrpoRun: "launch/grpo.py",
    PairsRun: "launch/pairs.py",
    PreferenceRun: "launch/preference.py",
    SftRun: "launch/sft.py",
}


def has_held_out(data: GrpoData | ExampleData) -> bool:
    """Say whether rows are held out for evaluation."""
    return bool(data.eval_path or data.eval_split or data.eval_rows)


def narrowed(section: Section, cls: type[SectionT]) -> SectionT:
    """Return a section as `cls`, a section with some of its keys."""
    return cls(**{name: getattr(section, name) for name in cls.__struct_fields__})


def builtins(section: Section) -> dict[str, Any]:
    """Return a section as plain values, for messages and files."""
    return to_builtins(section)
