"""Which GPU each process of a run gets, on a host with NVIDIA GPUs.

The learner takes the first and the actors the following ones; with more processes than GPUs, they
start over and share. Reward servers keep the user's environment: a judge model may want a GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from launch.processes.children import ChildSpec, Processes
from launch.processes.gpus import has_one_gpu, one_gpu, visible_gpus
from protocol.config.settings import AnyRun, GrpoRun, OnlineRun, PairsRun
from protocol.errors import require


def require_gpus(run: AnyRun) -> None:
    """Raise ConfigError where `train.device` or `actors.devices` names a GPU that is not here."""
    asked = {"train.device": _of_learner(run), "actors.devices": _of_actors(run)}
    if not any(asked.values()):
        return

    count = len(visible_gpus())
    rule = "needs NVIDIA GPUs, of which there is none here: leave it out"
    if count:
        rule = f"must be below {count}, the number of GPUs here"
    for field, indices in asked.items():
        for index in indices:
            require(index < count, field, rule, index)


def colocates(run: AnyRun, gpus: Sequence[str]) -> bool:
    """Whether the learner's process samples, too: as asked, or where one actor has its only GPU.

    Two processes would take turns on it as well, with the base weights in memory twice. On a CPU
    they compute at the same time, on cores of their own.
    """
    if not isinstance(run, GrpoRun):
        return False
    if run.actors.colocate != "auto":
        return run.actors.colocate
    return run.actors.count == 1 and not run.actors.devices and has_one_gpu(gpus)


def place(processes: Processes, run: AnyRun, gpus: Sequence[str]) -> Processes:
    """Give learner and actors one of `gpus` each, and note who has which; without GPUs, nothing."""
    if not gpus:
        return processes

    actors = [spec.name for spec in processes.helpers if spec.kind == "actor"]
    chosen = assign(run, processes.learner.name, actors, len(gpus))

    def placed(spec: ChildSpec) -> ChildSpec:
        if spec.name not in chosen:
            return spec
        own = one_gpu(gpus[chosen[spec.name]])
        return replace(spec, environment={**spec.environment, **own})

    return replace(
        processes,
        learner=placed(processes.learner),
        helpers=[placed(spec) for spec in processes.helpers],
        notes=[*processes.notes, *_notes(chosen, len(gpus))],
    )


def assign(run: AnyRun, learner: str, actors: Sequence[str], count: int) -> dict[str, int]:
    """Return the index of each process's GPU, of `count`."""
    first = next(iter(_of_learner(run)), 0)
    order = [first, *(index for index in range(count) if index != first)]
    # The collector of pairs holds the model, but computes nothing.
    used = 0 if isinstance(run, PairsRun) else 1

    asked = _of_actors(run)
    found = {learner: first}
    for index, name in enumerate(actors):
        own = asked[index % len(asked)] if asked else order[(used + index) % count]
        found[name] = own
    return found


def _of_learner(run: AnyRun) -> list[int]:
    """Return the GPU that the user chose for the learner, if any."""
    if isinstance(run, PairsRun) or run.train.device is None:
        return []
    return [run.train.device]


def _of_actors(run: AnyRun) -> list[int]:
    """Return the GPUs that the user chose for the local actors, which take them in turn."""
    return run.actors.devices or [] if isinstance(run, OnlineRun) else []


def _notes(chosen: Mapping[str, int], count: int) -> list[str]:
    """Say who computes where; nothing where one process has the only GPU."""
    if count == 1 and len(chosen) == 1:
        return []

    parts: list[str] = []
    for gpu in sorted(set(chosen.values())):
        names = [name for name, index in chosen.items() if index == gpu]
        together = " share it" if len(names) > 1 else ""
        parts.append(f"GPU {gpu}: {', '.join(names)}{together}")
    return ["; ".join(parts)]
