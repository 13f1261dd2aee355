"""Which processes a run starts, with which commands and endpoints."""

import sys
from dataclasses import replace
from pathlib import Path

from launch.processes.blas import deterministic_kernels
from launch.processes.children import ChildSpec, Processes
from launch.processes.gpus import visible_gpus
from launch.processes.placement import colocates, place
from launch.processes.restarts import RestartLimit
from launch.processes.start import GRACE_S
from protocol.config.settings import GrpoRun, OfflineRun, OnlineRun, PairsRun, TrainingRun
from protocol.errors import ConfigError

LAUNCH = Path(__file__).parents[1]


def program(name: str, *arguments: str) -> list[str]:
    """Return the command of one of our programs, in this interpreter."""
    return [sys.executable, str(LAUNCH / name), *arguments]


def offline_processes(run: OfflineRun, folder: Path) -> Processes:
    """Return the processes of a run without actors: the learner alone."""
    learner = learner_spec(run, folder)
    processes = Processes(learner, stop_timeout_s=run.run.stop_timeout_s)
    return place(processes, run, visible_gpus())


def learner_spec(run: TrainingRun, folder: Path, *arguments: str) -> ChildSpec:
    """Return the learner of a run, which recovers what it did before when it is started again."""
    command = program("processes/learn.py", str(folder), "--child")
    command += ["--stop-timeout-s", f"{run.run.stop_timeout_s:g}", *arguments]
    limit = RestartLimit(run.run.max_restarts, run.run.restart_window_s)
    return ChildSpec("learner", "learner", command, limit)


def online_processes(run: OnlineRun, folder: Path, sockets: Path) -> Processes:
    """Return the learner (of PairsRun the collector), local actors and reward servers.

    `sockets` is a folder for ipc endpoints. Local actors are required unless actors elsewhere can
    connect to `transport.bind`, or the learner is its own actor.
    """
    gpus = visible_gpus()
    colocated = colocates(run, gpus)
    endpoint = f"ipc://{sockets}/learner"
    services, servers = reward_services(run, sockets)

    arguments = ["--colocate"] if colocated else ["--endpoint", endpoint]
    if not colocated or run.transport.bind:
        arguments += ["--snapshots", snapshot_endpoint(run, sockets)]
    if run.transport.bind:
        arguments += ["--endpoint", run.transport.bind]
    for service in services:
        arguments += ["--rewards", service]
    if isinstance(run, PairsRun):  # which cannot be continued, so that it is not restarted
        command = program("processes/collect.py", str(folder), "--child", *arguments)
        learner, stop_timeout_s = ChildSpec("collect", "learner", command), GRACE_S
    else:
        learner, stop_timeout_s = learner_spec(run, folder, *arguments), run.run.stop_timeout_s

    actors = [] if colocated else actor_specs(run, folder, endpoint)
    required = {"reward server"} if servers else set[str]()
    if not colocated and not run.transport.bind:
        required.add("actor")
    if isinstance(run, GrpoRun) and run.run.deterministic:
        learner, *actors = [_with_even_kernels(spec) for spec in (learner, *actors)]
    helpers = [*servers, *actors]
    processes = Processes(learner, helpers, frozenset(required), stop_timeout_s=stop_timeout_s)
    return place(processes, run, gpus)


def _with_even_kernels(spec: ChildSpec) -> ChildSpec:
    return replace(spec, environment={**spec.environment, **deterministic_kernels()})


def reward_services(run: OnlineRun, sockets: Path) -> tuple[list[str], list[ChildSpec]]:
    """Return the learner's `--rewards` values, and the local reward servers to start.

    Each value is one service, its endpoints joined by commas. All functions named by file or module
    are one service with `rewards.workers` local servers; all `zmq://` endpoints are another.
    """
    local = [name for name in run.rewards.functions if not name.startswith("zmq://")]
    remote = [f"tcp://{name[6:]}" for name in run.rewards.functions if name.startswith("zmq://")]
    endpoints = [f"ipc://{sockets}/reward-{i}" for i in range(run.rewards.workers)]
    if run.transport.bind:
        endpoints = [port_above(run.transport.bind, 2 + i) for i in range(run.rewards.workers)]

    servers = [
        ChildSpec(
            f"reward-{i}",
            "reward server",
            program("reward_server.py", *local, "--bind", endpoint, "--child", *_keys(run)),
            helper_restarts(run),
        )
        for i, endpoint in enumerate(endpoints)
    ]
    services = [",".join(endpoints)] * bool(local) + [",".join(remote)] * bool(remote)
    return services, servers if local else []


def actor_specs(run: OnlineRun, folder: Path, endpoint: str) -> list[ChildSpec]:
    """Return the local actors to start; `endpoint` is the learner's."""
    settings = run.actors
    common = ["--connect", endpoint, "--run-dir", str(folder), "--child"]
    common += ["--max-concurrent-completions", str(settings.max_concurrent_completions)]
    common += ["--prefill-step-size", str(settings.prefill_step_size), *_keys(run)]
    names = [f"actor-{i}" for i in range(settings.count)]
    return [
        ChildSpec(name, "actor", program("actor.py", *common, "--name", name), helper_restarts(run))
        for name in names
    ]


def helper_restarts(run: OnlineRun) -> RestartLimit:
    """Return how often an actor, or a reward server, is started again."""
    return RestartLimit(run.actors.max_restarts, run.run.restart_window_s)


def snapshot_endpoint(run: OnlineRun, sockets: Path) -> str:
    """Return where snapshots are served: for remote actors, on the port above `transport.bind`."""
    if not run.transport.bind:
        return f"ipc://{sockets}/snapshots"
    return port_above(run.transport.bind, 1)


def port_above(endpoint: str, offset: int) -> str:
    """Return the tcp endpoint `offset` ports above: 1 serves snapshots, 2 and up rewards."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not port.isdecimal():
        raise ConfigError(
            f"transport.bind {endpoint!r}: required tcp://host:port with a port number; the ports "
            "above it serve snapshots and rewards"
        )
    return f"tcp://{host}:{int(port) + offset}"


def _keys(run: OnlineRun) -> list[str]:
    return ["--keys", run.transport.keys] if run.transport.keys else []
