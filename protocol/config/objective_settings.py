"""The `[objective]` section of each program: TRL 1.16.0's names and defaults."""

from typing import Annotated, Literal

from msgspec import Meta, field

from protocol.config.fields import (
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    UpToOne,
    doc,
)


class GrpoSettings(Section, frozen=True, kw_only=True):
    """The GRPO family; TRL 1.16.0's names and defaults."""

    loss_type: Annotated[
        Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"],
        doc("Surrogate and normalisation of the loss."),
    ] = "dapo"
    beta: Annotated[NonNegative, doc("Weight of the KL term; 0: no reference is loaded.")] = 0.0
    epsilon: Annotated[Positive, doc("Ratios are clipped below 1 - epsilon.")] = 0.2
    epsilon_high: Annotated[
        Positive | None,
        doc(
            "Ratios are clipped above 1 + epsilon_high, or with cispo above epsilon_high "
            "itself; none: `epsilon`."
        ),
    ] = None
    delta: Annotated[
        Positive | None,
        doc("Upper bound of the ratio before its clipping (two-sided clipping); none: off."),
    ] = None
    num_iterations: Annotated[PositiveInt, doc("Optimiser steps per batch.")] = 1
    importance_sampling_level: Annotated[
        Literal["token", "sequence"], doc("Ratios per token, or one per sequence (GSPO).")
    ] = "token"
    scale_rewards: Annotated[
        Literal["group", "batch", "none"], doc("Whose standard deviation divides the advantages.")
    ] = "group"
    multi_objective_aggregation: Annotated[
        Literal["sum_then_normalize", "normalize_then_sum"],
        doc("Normalise the weighted sum of the rewards, or each reward first (GDPO)."),
    ] = "sum_then_normalize"
    mask_truncated_completions: Annotated[
        bool, doc("Leave completions out of the loss that reached the length limit.")
    ] = False
    top_entropy_quantile: Annotated[
        UpToOne, doc("Share of tokens, those of highest entropy, in the policy loss; 1: all.")
    ] = 1.0
    use_bias_correction_kl: Annotated[
        bool, doc("Weight the KL term with the importance ratio (DeepSeek-V3.2).")
    ] = True
    off_policy_mask_threshold: Annotated[
        float | None,
        doc(
            "Leave out sequences of negative advantage whose log-probs fell by more than this per "
            "token since sampling, in nats (DeepSeek-V3.2); none: off."
        ),
    ] = None
    entropy_coef: Annotated[float, doc("Weight of the entropy bonus; 0: off.")] = 0.0
    sapo_temperature_pos: Annotated[
        Positive, doc("Temperature of SAPO's gate where the advantage is positive.")
    ] = 1.0
    sapo_temperature_neg: Annotated[Positive, doc("Temperature of SAPO's gate elsewhere.")] = 1.05
    vespo_k_pos: Annotated[
        float, doc("Exponent of VESPO's weight where the advantage is not negative.")
    ] = 2.0
    vespo_lambda_pos: Annotated[float, doc("Exponential decay of the same weight.")] = 3.0
    vespo_k_neg: Annotated[
        float, doc("Exponent of VESPO's weight where the advantage is negative.")
    ] = 3.0
    vespo_lambda_neg: Annotated[float, doc("Exponential decay of the same weight.")] = 2.0
    old_logprobs: Annotated[
        Literal["sampler", "recompute"],
        doc(
            "Where the ratio's old log-probs come from: the sampler, or a forward pass of "
            "the learner before the batch's first step."
        ),
    ] = "sampler"
    importance_sampling_correction: Annotated[
        bool,
        doc(
            "Weight the loss with the ratio of the learner's probabilities to the "
            "sampler's; needs `old_logprobs` = recompute."
        ),
    ] = False
    importance_sampling_mode: Annotated[
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
        doc("That correction: per token or sequence, clipped or set to 0 beyond its bounds."),
    ] = "sequence_mask"
    importance_sampling_clip_max: Annotated[Positive, doc("Upper bound of that correction.")] = 3.0
    importance_sampling_clip_min: Annotated[
        NonNegative | None, doc("Lower bound of that correction; none: no bound.")
    ] = None
    zero_advantage_step: Annotated[
        bool, doc("Step even if every advantage of a batch is zero, as TRL does.")
    ] = False


class PreferenceSettings(Section, frozen=True, kw_only=True):
    """Preference losses; TRL 1.16.0's names and defaults."""

    method: Annotated[
        Literal["dpo", "cpo", "simpo", "orpo", "kto"], doc("The family of the loss.")
    ] = "dpo"
    loss_type: Annotated[
        list[str],
        doc("Loss of the method; with dpo also several, which are added with `loss_weights`."),
    ] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: Annotated[list[float] | None, doc("Factor per `loss_type`; none: all 1.")] = None
    beta: Annotated[
        Positive, doc("Scale of the implicit rewards: the higher, the closer to the reference.")
    ] = 0.1
    label_smoothing: Annotated[
        float, Meta(ge=0, lt=0.5), doc("Probability that a preference is the wrong way round.")
    ] = 0.0
    f_divergence_type: Annotated[
        Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
        doc("Divergence from the reference that scores the log-ratios (f-DPO)."),
    ] = "reverse_kl"
    f_alpha_divergence_coef: Annotated[float, doc("Alpha of the alpha divergence.")] = 0.5
    ld_alpha: Annotated[
        UpToOne | None,
        doc("Weight of the tokens beyond the shorter answer's length (LD-DPO); none: 1."),
    ] = None
    use_weighting: Annotated[bool, doc("Weight pairs by the policy's probability (WPO).")] = False
    discopop_tau: Annotated[Positive, doc("Temperature of the discopop loss.")] = 0.05
    simpo_gamma: Annotated[float, doc("Target margin of the rewards (SimPO).")] = 0.5
    cpo_alpha: Annotated[
        float, doc("Weight of the chosen answer's likelihood (CPO, SimPO); 0: plain SimPO.")
    ] = 1.0
    alpha: Annotated[float, doc("Shape of the reward (AlphaPO); 0: the log-prob itself.")] = 0.0
    desirable_weight: Annotated[Positive, doc("Weight of good answers (KTO).")] = 1.0
    undesirable_weight: Annotated[Positive, doc("Weight of bad answers (KTO).")] = 1.0
    reference_free: Annotated[bool, doc("Leave the reference out: its log-probs are 0.")] = False
    precompute_ref_log_probs: Annotated[
        bool,
        doc(
            "Score all rows with the reference before training, then unload it; the log-probs are "
            "kept in `$HF_DATASETS_CACHE/pippin` for later runs."
        ),
    ] = False


class SftSettings(Section, frozen=True, kw_only=True):
    """Plain fine-tuning."""

    completion_only_loss: Annotated[
        bool | None,
        doc(
            "Whether only completions count in the loss; none: where rows have a prompt. With "
            "messages, true: only the last answer counts."
        ),
    ] = None
