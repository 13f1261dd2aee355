"""The learner's side of launch/pairs.py: leases prompts to actors, and writes pairs, not steps.

`launch/processes/collect.py RUN_DIR --endpoint … --snapshots … [--rewards …]`, started by
launch/pairs.py. Ledger, coordinator and service are those of GRPO; a batch is written instead of
trained on, and the same policy is announced again as the next version. Exit status 0: all prompts
were answered or given up, or it was asked to stop; 1: it failed.
"""

import argparse
import logging
from pathlib import Path
from typing import Any, TextIO

import msgspec
from msgspec import structs

from launch.processes.learner_program import run_learner
from launch.processes.start import Lifeline
from protocol.config.load import load
from protocol.config.settings import ModelSettings, PairsRun, builtins
from protocol.run_record import State, change_state

log = logging.getLogger("pippin.pairs")
POLL_S = 0.2


def effective(settings: PairsRun) -> PairsRun:
    """Return the settings as the mode changes them.

    Mode "given" samples one completion per prompt from the base model, without its adapter.
    """
    if settings.pairs.mode == "best_worst":
        return settings

    # The B of fresh adapters is zero, so that learner and actors compute exactly the base.
    model = structs.replace(settings.model, adapter_path="", fine_tune_type="lora")
    sampling = structs.replace(settings.sampling, num_generations=1)
    return structs.replace(settings, model=model, sampling=sampling)


def epochs(settings: PairsRun) -> float | None:
    """Return the passes over the rows; None: as many as `train.max_steps` batches need.

    In mode "given" a second pass repeats the chosen answers, so that only
    `train.num_train_epochs` asks for one.
    """
    if settings.train.max_steps < 0:
        return settings.train.num_train_epochs
    return 1.0 if settings.pairs.mode == "given" else None


def collect(args: argparse.Namespace, lifeline: Lifeline) -> State:
    """Serve the prompts until all are answered; write pairs and their counts; say how it ended."""
    from learner.build.online import (
        OnlineAddresses,
        OnlinePlan,
        new_coordinator,
        new_service,
        total_batches,
    )
    from learner.data.prompts import open_prompts
    from learner.online.commands import Command, Reply
    from learner.online.source import OnlineSource
    from protocol.model.policy import load_policy
    from protocol.transport.bridge import Bridge

    settings = effective(load(PairsRun, args.run_dir / "config.toml"))
    model = ModelSettings(**builtins(settings.model))
    policy = load_policy(model, seed=settings.run.seed)
    prompts = open_prompts(
        settings.data,
        policy.tokenizer,
        seed=settings.run.seed,
        epochs=epochs(settings),
        batch_size=settings.train.batch_size,
    )
    total = total_batches(settings, prompts)

    addresses = OnlineAddresses(args.endpoint, args.snapshots, args.rewards)
    plan = OnlinePlan(args.run_dir, addresses, settings, model, policy, prompts, total)
    bridge = Bridge[Command, Reply]()
    source = OnlineSource(bridge, policy.model, args.run_dir / "policy")
    service = new_service(plan, new_coordinator(plan), bridge)
    change_state(args.run_dir, "running")

    with bridge, output_path(settings, args.run_dir).open("w", encoding="utf-8") as file:
        bridge.start(lambda _: service.run())
        writer = Writer(settings, policy.tokenizer, file)
        source.stepped(0)
        step = 0
        while step < total and not source.exhausted and not lifeline.stop_requested:
            batch = source.poll(POLL_S)
            if batch is not None:
                for item in batch.groups:
                    writer.add(item)
                step += 1
                log.info("batch %d of %d: %s", step, total, writer.counts)
                source.stepped(step)
        if step < settings.train.max_steps and not lifeline.stop_requested:
            log.warning(
                "all rows are paired after %d of train.max_steps = %d batches: each row is used "
                "once; for several pairs per row, set train.num_train_epochs instead",
                step,
                settings.train.max_steps,
            )
        writer.finish(args.run_dir)
        source.finish("all prompts are answered")

    return "stopped" if lifeline.stop_requested else "finished"


def output_path(settings: PairsRun, folder: Path) -> Path:
    """Return the file that the pairs go to."""
    return Path(settings.pairs.output) if settings.pairs.output else folder / "pairs.jsonl"


class Writer:
    """Writes a line of JSON per pair, and counts the groups that gave none, by reason."""

    def __init__(self, settings: PairsRun, tokenizer: Any, file: TextIO) -> None:  # noqa: ANN401 - mlx-lm's wrapper
        self.counts: dict[str, int] = {"pairs": 0}
        self._settings = settings
        self._tokenizer = tokenizer
        self._file = file

    def add(self, item: Any) -> None:  # noqa: ANN401 - a PromptGroup of the learner, heavy
        """Write the pair of a group, if it has one."""
        from launch.processes.pairing import best_and_worst, given_and_own
        from learner.online.experience import reward_matrix
        from protocol.messages.arrays import ids_view

        # A chat's answer is a message of its own; a plain completion continues its prompt.
        prompt_ids = None if isinstance(item.prompt.row["prompt"], list) else item.prompt.prompt_ids
        texts = [
            continuation(self._tokenizer, prompt_ids, ids_view(c.token_ids).tolist())
            for c in item.group.completions
        ]

        _, rewards = reward_matrix([item])
        weights = self._settings.rewards.reward_weights
        if self._settings.pairs.mode == "given":
            column = self._settings.pairs.answer_column
            pair = given_and_own(item.prompt.row, column, texts, rewards, weights)
        else:
            pair = best_and_worst(item.prompt.row, texts, rewards, weights)

        if isinstance(pair, str):
            self.counts[pair] = self.counts.get(pair, 0) + 1
            return
        self.counts["pairs"] += 1
        line = {**pair, "row": item.prompt.row_key}
        self._file.write(msgspec.json.encode(line).decode() + "\n")

    def finish(self, folder: Path) -> None:
        """Write the counts to `pairs.json`."""
        counted = msgspec.json.format(msgspec.json.encode(self.counts))
        (folder / "pairs.json").write_bytes(counted + b"\n")


def continuation(
    tokenizer: Any,  # noqa: ANN401 - mlx-lm's wrapper
    prompt_ids: list[int] | None,
    completion_ids: list[int],
) -> str:
    """Return a completion's text, which appended to the prompt's text reads as it was sampled.

    A leading space belongs to the completion; decoders drop it where the completion is decoded
    alone. `prompt_ids` None: a chat's answer, which is not appended to anything.
    """
    alone: str = tokenizer.decode(completion_ids, skip_special_tokens=True)
    if prompt_ids is None:
        return alone
    head: str = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    both: str = tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True)
    return both[len(head) :] if both.startswith(head) else alone


if __name__ == "__main__":
    run_learner("collect", __doc__, collect)
