"""The learner's side of launch/pairs.py: leases prompts to actors, and writes pairs, not steps.

`launch/processes/collect.py RUN_DIR --endpoint … --snapshots … [--rewards …]`, started by
launch/pairs.py. Ledger, coordinator and service are those of GRPO; a batch is written instead of
trained on, and the same policy is announced again as the next version. Exit status: that of
`exit_status.py`; finished: all prompts were answered or given up.
"""

import argparse
import logging
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
from msgspec import structs

from launch.processes.learner_program import run_learner
from launch.processes.start import Lifeline
from protocol.config.load import load
from protocol.config.settings import ModelSettings, PairsRun, builtins
from protocol.run_record import State, WorkDone, change_state, record_event

if TYPE_CHECKING:
    from learner.online.experience import PromptGroup
    from learner.online.source import OnlineSource

log = logging.getLogger("pippin.pairs")
POLL_S = 0.2


def effective(settings: PairsRun) -> PairsRun:
    """Return the settings as the mode changes them.

    Mode "given" samples one completion per prompt from the base model, without its adapter.
    """
    if settings.pairs.mode == "best_worst":
        return settings

    # The B matrix of fresh adapters is zero, so that learner and actors compute exactly the base.
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
    # Here, because these imports load MLX, which start_process prepares.
    from learner.build import online
    from learner.build.grpo_run import total_batches
    from learner.data.prompts import open_prompts
    from learner.ledger.ledger import Ledger
    from learner.online.commands import Command, Reply
    from learner.online.source import OnlineSource
    from protocol.model.dimensions import weight_bytes
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

    addresses = online.OnlineAddresses(args.endpoint, args.snapshots, args.rewards)
    plan = online.OnlinePlan(args.run_dir, addresses, settings, model, policy, prompts, total)
    bridge = Bridge[Command, Reply]()
    source = OnlineSource(bridge, policy.model, args.run_dir / "policy")
    ledger = Ledger.new(online.ledger_settings(plan), args.run_dir.name, uuid.uuid4().hex)
    coordinator = online.new_coordinator(plan, ledger, weight_bytes(policy.model))
    service = online.new_service(plan, coordinator, bridge)
    change_state(args.run_dir, "running")

    output = Path(settings.pairs.output or args.run_dir / "pairs.jsonl")
    with bridge, output.open("w", encoding="utf-8") as file:
        bridge.start(lambda _: service.run())
        writer = Writer(settings, policy.tokenizer, file)
        step = _write_batches(source, writer, total, lifeline)
        if step < settings.train.max_steps and not lifeline.stop_requested:
            log.warning(
                "all rows are paired after %d of train.max_steps = %d batches: each row is used "
                "once; for several pairs per row, set train.num_train_epochs instead",
                step,
                settings.train.max_steps,
            )

        # Before the actors are told to leave: the launcher reads the counts when we end.
        writer.finish(args.run_dir)
        record_event(args.run_dir, WorkDone())
        source.finish("all prompts are answered")

    return "stopped" if lifeline.stop_requested else "finished"


def _write_batches(source: "OnlineSource", writer: "Writer", total: int, lifeline: Lifeline) -> int:
    """Write the pairs of up to `total` batches as they come; return the number of batches."""
    source.publish(0)
    step = 0
    while step < total and not source.exhausted and not lifeline.stop_requested:
        batch = source.poll(POLL_S)
        if batch is None:
            continue

        for item in batch.groups:
            writer.add(item)
        step += 1
        log.info("batch %d of %d: %s", step, total, writer.counts)
        # Counts as a step of a policy that stays the same, so that actors go on sampling.
        source.publish(step)
    return step


class Writer:
    """Writes a line of JSON per pair, and counts the groups that gave none, by reason."""

    def __init__(self, settings: PairsRun, tokenizer: Any, file: TextIO) -> None:  # noqa: ANN401 - mlx-lm's wrapper
        self.counts: dict[str, int] = {"pairs": 0}
        self._settings = settings
        self._tokenizer = tokenizer
        self._file = file

    def add(self, item: "PromptGroup") -> None:
        """Write the pair of a group, if it has one."""
        from launch.processes.pairing import best_and_worst, given_and_own
        from learner.online.experience import reward_matrix
        from protocol.messages.arrays import ids_view

        # A chat's answer is a separate message; a plain completion continues its prompt.
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
        data = msgspec.json.format(msgspec.json.encode(self.counts))
        (folder / "pairs.json").write_bytes(data + b"\n")


def continuation(
    tokenizer: Any,  # noqa: ANN401 - mlx-lm's wrapper
    prompt_ids: list[int] | None,
    completion_ids: list[int],
) -> str:
    """Return a completion's text such that prompt + text reads as it was sampled.

    `prompt_ids` None: a chat's answer, which is not appended to anything.
    """
    alone: str = tokenizer.decode(completion_ids, skip_special_tokens=True)
    if prompt_ids is None:
        return alone

    # A leading space belongs to the completion, but decoders drop it from a text's beginning.
    head: str = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    both: str = tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True)
    return both[len(head) :] if both.startswith(head) else alone


if __name__ == "__main__":
    run_learner("collect", __doc__, collect)
