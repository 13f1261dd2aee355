"""Recorded TRL runs as the learner's batches, with the recording's IDs, masks and advantages."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from learner.data.examples import PreferenceExample, SftExample, UnpairedExample
from learner.losses.grpo import grpo_normalisers
from learner.model.batches import TokenArrays, to_device, token_batch
from learner.model.trials import choose_head
from learner.objectives.advantages import advantages
from learner.objectives.base import frozen_logprobs
from learner.objectives.grpo import GrpoArrays, GrpoObjective
from learner.objectives.kto import KtoObjective
from learner.objectives.preference import PreferenceObjective
from learner.objectives.sft import SftObjective
from protocol.config.settings import (
    GrpoRewards,
    GrpoSettings,
    PreferenceSettings,
    SamplingSettings,
    TrainSettings,
)

Objective = SftObjective | PreferenceObjective | KtoObjective | GrpoObjective
OldLogps = dict[int, mx.array]
METHODS = {"DPOTrainer": "dpo", "ORPOTrainer": "orpo", "CPOTrainer": "cpo", "KTOTrainer": "kto"}


@dataclass(frozen=True)
class Recording:
    """One run: its JSON, its arrays by name, and what to set otherwise than TRL was told."""

    data: dict[str, Any]
    arrays: Mapping[str, mx.array]
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> str:
        """TRL's class."""
        return self.data["trainer"].rsplit(".", 1)[-1]

    @property
    def arguments(self) -> dict[str, Any]:
        """What TRL's configuration was given, with the changes."""
        recorded = self.data.get("all_args", {}) | self.data["explicit_args"]
        if unknown := self.changes.keys() - recorded.keys():
            raise KeyError(f"{self.data['case']} has no arguments {sorted(unknown)}")
        return recorded | self.changes


def read(path: Path, changes: Mapping[str, Any]) -> Recording:
    """Read a run's `.json` and the `.safetensors` beside it."""
    arrays = mx.load(str(path.with_suffix(".safetensors")))
    assert isinstance(arrays, dict)
    return Recording(json.loads(path.read_text()), arrays, changes)


def objective_of(
    recording: Recording, model: nn.Module, reference: nn.Module | None, train: TrainSettings
) -> Objective:
    """Return the learner's objective with the run's settings."""
    given = recording.arguments
    head = choose_head(model, train.head)
    if recording.trainer == "SFTTrainer":
        return SftObjective(train, head)
    if recording.trainer == "GRPOTrainer":
        names = ("loss_type", "beta", "num_iterations", "epsilon", "use_bias_correction_kl")
        settings = GrpoSettings(**{name: given[name] for name in names})
        sampling = SamplingSettings(
            temperature=given["temperature"], max_completion_length=given["max_completion_length"]
        )
        return GrpoObjective(
            settings, train, sampling, GrpoRewards(), model, head, lambda *_: {}, reference
        )
    method = METHODS[recording.trainer]
    values: dict[str, Any] = {"method": method, "beta": given["beta"]}
    if method != "orpo":
        types = given["loss_type"]
        values["loss_type"] = [types] if isinstance(types, str) else types
    if method == "cpo":
        values |= {"cpo_alpha": given["cpo_alpha"], "simpo_gamma": given["simpo_gamma"]}
    settings = PreferenceSettings(**values)
    made = KtoObjective if method == "kto" else PreferenceObjective
    return made(settings, train, head, model, reference)


def micro_batches(
    recording: Recording, step: dict[str, Any], objective: Objective, old: OldLogps
) -> Sequence[Any]:
    """Return a step's micro-batches, prepared as training prepares them.

    `old` is kept from step to step: GRPO's log-probs of the rollouts in use.
    """
    inputs = [micro["inputs"] for micro in step["micro"]]
    if isinstance(objective, GrpoObjective):
        return _grpo(recording, step, objective, old)
    if isinstance(objective, SftObjective):
        return objective.prepare([e for part in inputs for e in _sft(part)]).micro
    if isinstance(objective, KtoObjective):
        return objective.prepare([e for part in inputs for e in _kto(part)]).micro
    if recording.trainer == "DPOTrainer":
        return objective.prepare([e for part in inputs for e in _dpo(part)]).micro
    return objective.prepare([e for part in inputs for e in _odds(part)]).micro


def _sft(part: dict[str, Any]) -> Iterator[SftExample]:
    for ids, labels, mask in zip(
        part["input_ids"], part["labels"], part["attention_mask"], strict=True
    ):
        length = sum(mask)
        yield SftExample(0, ids[:length], [int(label != -100) for label in labels[:length]])


def _split(ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """Return prompt and completion; `mask` is 1 on the completion."""
    start = mask.index(1)
    return ids[:start], ids[start : start + sum(mask)]


def _dpo(part: dict[str, Any]) -> Iterator[PreferenceExample]:
    rows = [_split(*row) for row in zip(part["input_ids"], part["completion_mask"], strict=True)]
    half = len(rows) // 2
    for chosen, rejected in zip(rows[:half], rows[half:], strict=True):
        yield PreferenceExample(0, *chosen, *rejected)


def _odds(part: dict[str, Any]) -> Iterator[PreferenceExample]:
    sides: list[list[tuple[list[int], list[int]]]] = []
    for side in ("chosen", "rejected"):
        labels = part[f"{side}_labels"]
        masks = [[int(label != -100) for label in row] for row in labels]
        rows = zip(part[f"{side}_input_ids"], masks, strict=True)
        sides.append([_split(*row) for row in rows])
    for chosen, rejected in zip(*sides, strict=True):
        yield PreferenceExample(0, *chosen, *rejected)


def _kto(part: dict[str, Any]) -> Iterator[UnpairedExample]:
    rows = zip(part["input_ids"], part["completion_mask"], part["label"], strict=True)
    for ids, mask, label in rows:
        yield UnpairedExample(0, *_split(ids, mask), label)


def advantages_of(
    micro: list[dict[str, Any]], scale_rewards: Literal["group", "batch", "none"]
) -> list[np.ndarray]:
    """Return each micro-batch's advantages: from rewards where they were recorded.

    Such a step's micro-batches are a whole generation batch, with its groups spread over them.
    """
    if "rewards" not in micro[0]:
        return [np.array(part["inputs"]["advantages"]) for part in micro]
    result = advantages(
        np.array([[reward] for part in micro for reward in part["rewards"]]),
        groups=np.array([row for part in micro for row, _ in part["rollout"]]),
        names=["fixed_reward"],
        scale_rewards=scale_rewards,
    )
    return list(np.split(result.advantages, len(micro)))


def _grpo(
    recording: Recording, step: dict[str, Any], objective: GrpoObjective, old: OldLogps
) -> list[GrpoArrays]:
    given = recording.arguments
    accumulation = given["gradient_accumulation_steps"]
    inputs = [part["inputs"] for part in step["micro"]]
    sums = np.array([sum(row) for part in inputs for row in part["completion_mask"]])
    values = grpo_normalisers(
        mask_sums=sums,
        max_completion_length=objective.sampling.max_completion_length,
    )
    generated = inputs[0]["num_items_in_batch"] * accumulation / generation_slices(recording)
    values["generation_tokens"] = max(generated, 1.0)
    normalisers = {k: mx.array(v, dtype=mx.float32) for k, v in values.items()}
    found = advantages_of(step["micro"], given["scale_rewards"])
    micro: list[GrpoArrays] = []
    first = (step["step"] - 1) * accumulation
    for number, (part, part_advantages) in enumerate(zip(inputs, found, strict=True)):
        arrays: GrpoArrays = {
            **_tokens(part, objective),
            "normalisers": normalisers,
            "advantages": mx.array(part_advantages.astype(np.float32)),
            "sampling_logprobs": _old_logprobs(recording, first + number, objective, old),
            "sequence_mask": mx.ones(len(part_advantages)),
        }
        if objective.reference is not None:
            arrays["ref_logprobs"] = _logprobs(objective, objective.reference, arrays)
        mx.eval(arrays)
        micro.append(arrays)
    return micro


def generation_slices(recording: Recording) -> int:
    """Return into how many micro-batches TRL cuts a generation batch."""
    given = recording.arguments
    return given["steps_per_generation"] or given["gradient_accumulation_steps"]


def _old_logprobs(
    recording: Recording, index: int, objective: GrpoObjective, old: OldLogps
) -> mx.array:
    """Return (B, C) log-probs of the run's micro-batch `index` when its rollouts came.

    As in TRL, they are the policy's own then: TRL's recorded ones would make the ratio differ from
    1 by the rounding of both programs where it is 1 in each.
    """
    slices = generation_slices(recording)
    if index % (slices * recording.arguments["num_iterations"]) == 0:
        parts = [micro["inputs"] for step in recording.data["steps"] for micro in step["micro"]]
        for number, part in enumerate(parts[index : index + slices]):
            old[number] = _logprobs(objective, objective.model, _tokens(part, objective))
        mx.eval(old)
    return old[index % slices]


def _tokens(part: dict[str, Any], objective: GrpoObjective) -> TokenArrays:
    prompts = [
        [token for token, live in zip(ids, mask, strict=True) if live]
        for ids, mask in zip(part["prompt_ids"], part["prompt_mask"], strict=True)
    ]
    lengths = [sum(mask) for mask in part["completion_mask"]]
    completions = [ids[:n] for ids, n in zip(part["completion_ids"], lengths, strict=True)]
    tokens = token_batch(prompts, completions, length_bucket=objective.train.length_bucket)
    return to_device(tokens)


def _logprobs(objective: GrpoObjective, model: nn.Module, arrays: TokenArrays) -> mx.array:
    return frozen_logprobs(model, arrays, objective.head, objective.sampling.temperature)
