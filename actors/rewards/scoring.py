"""Scores one request on the worker process: time limits, restarts, and who is at fault.

    request ──▶ worker ──"started f"──"outcome f"── … ──"done"──▶ Scores ──▶ ScoreReply
                  └─ silent for timeout_s, or dead ──▶ killed

After a time-out or death, the functions that have not run yet run in a new worker.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

import anyio
import msgspec

from actors.rewards.contract import RewardOutcome
from actors.rewards.function_worker import ScoreJob
from actors.rewards.process import WorkerDied, WorkerProcess
from actors.rewards.queue import QueuedRequest
from actors.rewards.replies import join_lists
from protocol.messages.rewards import RewardFault, ScoreReply

log = logging.getLogger("pippin.rewards")

MAX_DEATHS = 2  # of the worker while a function runs, before the function is blamed
MAX_FAULTS_LOGGED = 1000


@dataclass
class Scores:
    """What the functions gave for one request so far, by function index."""

    outcomes: dict[int, RewardOutcome] = field(default_factory=dict[int, RewardOutcome])
    faults: dict[int, RewardFault] = field(default_factory=dict[int, RewardFault])

    def missing(self, functions: Sequence[int]) -> list[int]:
        """Return those of `functions` that have neither an outcome nor a fault."""
        return [i for i in functions if i not in self.outcomes and i not in self.faults]

    def reply(self, request_id: str, names: list[str], count: int, elapsed_s: float) -> ScoreReply:
        """Build the reply for `count` completions: None for every function without rewards."""
        outcomes = [self.outcomes.get(index, RewardOutcome()) for index in range(len(names))]
        faults = [self.faults.get(index) or outcome.fault for index, outcome in enumerate(outcomes)]

        logged = zip(names, outcomes, strict=True)
        no_rewards: list[float | None] = [None] * count
        return ScoreReply(
            id=request_id,
            names=names,
            rewards=[no_rewards if o.rewards is None else o.rewards for o in outcomes],
            log_extra=join_lists(outcome.log_extra for outcome in outcomes),
            log_metric={
                # Functions that use the same name do not mean the same number.
                f"{function}/{name}": fmean(numbers)
                for function, outcome in logged
                for name, numbers in outcome.log_metric.items()
            },
            faults=[fault for fault in faults if fault is not None],
            elapsed_s=elapsed_s,
        )


class WorkerScorer:
    """Runs requests on one worker process, one at a time."""

    def __init__(self, functions: Sequence[str]) -> None:
        self.worker = WorkerProcess(functions)
        self._running: list[int] = []  # functions under way, by index
        self._logged: set[tuple[str, str]] = set()

    async def score(self, request: QueuedRequest) -> Scores:
        """Run every function; after a time-out or death, the remaining ones in a new worker."""
        every = range(len(self.worker.names))
        scores = Scores()
        deaths: Counter[int] = Counter()

        while missing := scores.missing(every):
            self._running = []
            try:
                await self.worker.ensure_running()
                await self._collect(request, missing, scores)
                continue
            except WorkerDied:
                # It may have been killed from outside: blame a function only for a second death.
                suspects = self._running or missing
                deaths.update(suspects)
                blamed = [i for i in suspects if deaths[i] >= MAX_DEATHS]
                message = f"the process that ran it ended {MAX_DEATHS} times"
                self._blame(scores, blamed, "died", message)
            except TimeoutError:
                message = f"no answer within {request.timeout_s:g} s; its process was killed"
                self._blame(scores, self._running or missing[:1], "timeout", message)
            await self.worker.kill()

        return scores

    async def _collect(self, request: QueuedRequest, asked: list[int], scores: Scores) -> None:
        """Collect all outcomes; raise TimeoutError if a function takes longer than `timeout_s`."""
        with anyio.fail_after(request.timeout_s):
            await self.worker.send(ScoreJob(msgspec.Raw(request.data), asked))

        done = False
        while not done:
            with anyio.fail_after(request.timeout_s):  # starts again with every function
                done = await self._until_next_start(asked, scores)

    async def _until_next_start(self, asked: list[int], scores: Scores) -> bool:
        """Take outcomes until another function starts (False) or all have ended (True)."""
        while True:
            message = await self.worker.receive()
            if message.kind == "done":
                return True
            if message.kind == "started":
                asynchronous = message.index == -1  # these all run at once
                self._running = scores.missing(asked) if asynchronous else [message.index]
                return False

            outcome = scores.outcomes[message.index] = message.outcome
            self._running = [i for i in self._running if i != message.index]
            if outcome.fault is not None:
                self._log_once(outcome.fault, outcome.where, outcome.traceback)

    def _blame(
        self, scores: Scores, blamed: list[int], kind: Literal["died", "timeout"], message: str
    ) -> None:
        for index in blamed:
            name = self.worker.names[index]
            fault = RewardFault(function=name, kind=kind, message=message)
            scores.faults[index] = fault
            self._log_once(fault)

    def _log_once(self, fault: RewardFault, where: str = "", traceback: str = "") -> None:
        """Log a fault in full the first time that its kind occurs."""
        key = (fault.function, f"{fault.kind} {where}")
        if key not in self._logged and len(self._logged) < MAX_FAULTS_LOGGED:
            self._logged.add(key)
            text = traceback or fault.message
            log.error("reward %s: %s: %s", fault.function, fault.kind, text)
