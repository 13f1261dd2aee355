"""Asynchronous GRPO: `launch/grpo.py [recipe.toml] [--section.key value …]`.

Without a recipe it runs launch/recipes/addition.toml, which needs no network. It starts a learner,
the local actors and a reward server for the functions that are named, and keeps them.
"""

import sys
from pathlib import Path

from launch.cli.run import learner_spec, main, program, read_command_line, supervise
from launch.processes.children import ChildSpec
from protocol.config.settings import GrpoRun
from protocol.errors import ConfigError
from protocol.transport.endpoints import ipc_folder

USAGE = "usage: launch/grpo.py [recipe.toml] [--section.key value …]"
DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "addition.toml"


def reward_services(run: GrpoRun, sockets: Path) -> tuple[list[str], list[ChildSpec]]:
    """Return the `--rewards` values of the learner, and the local reward servers to start.

    Each value is one service, its endpoints joined by commas. The functions named by file or
    module are one service of `rewards.workers` local servers; all `zmq://` endpoints another.
    """
    local = [name for name in run.rewards.functions if not name.startswith("zmq://")]
    remote = [f"tcp://{name[6:]}" for name in run.rewards.functions if name.startswith("zmq://")]
    endpoints = [f"ipc://{sockets}/reward-{i}" for i in range(run.rewards.workers)]
    if run.transport.bind:
        endpoints = [neighbour(run.transport.bind, 2 + i) for i in range(run.rewards.workers)]
    keys = ["--keys", run.transport.keys] if run.transport.keys else []
    specs = [
        ChildSpec(
            f"reward-{i}",
            "reward server",
            program("reward_server.py", *local, "--bind", endpoint, "--child", *keys),
            run.actors.max_restarts,
        )
        for i, endpoint in enumerate(endpoints)
    ]
    services = [",".join(endpoints)] * bool(local) + [",".join(remote)] * bool(remote)
    return services, specs if local else []


def neighbour(endpoint: str, offset: int) -> str:
    """Return the tcp endpoint `offset` ports above: 1 serves snapshots, 2 and up rewards."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not port.isdecimal():
        raise ConfigError(
            f"transport.bind {endpoint!r}: required tcp://host:port with a port number; the ports "
            "above it serve snapshots and rewards"
        )
    return f"tcp://{host}:{int(port) + offset}"


def actor_specs(run: GrpoRun, endpoint: str) -> list[ChildSpec]:
    """Return the local actors to start."""
    settings = run.actors
    common = [
        "--connect",
        endpoint,
        "--child",
        "--max-concurrent-completions",
        str(settings.max_concurrent_completions),
    ]
    common += ["--prefill-step-size", str(settings.prefill_step_size)]
    common += ["--keys", run.transport.keys] if run.transport.keys else []
    return [
        ChildSpec(
            f"actor-{i}",
            "actor",
            program("actor.py", *common, "--name", f"actor-{i}"),
            settings.max_restarts,
        )
        for i in range(settings.count)
    ]


def snapshot_endpoint(run: GrpoRun, sockets: Path) -> str:
    """Return where snapshots are served: for remote actors, on the port after `transport.bind`."""
    if not run.transport.bind:
        return f"ipc://{sockets}/snapshots"
    return neighbour(run.transport.bind, 1)


def body() -> int:
    """Read the recipe, start the run, see it through."""
    run, folder = read_command_line(GrpoRun, sys.argv[1:], USAGE, DEFAULT_RECIPE)
    with ipc_folder() as sockets:
        endpoint = f"ipc://{sockets}/learner"
        services, servers = reward_services(run, sockets)
        arguments = ["--endpoint", endpoint, "--snapshots", snapshot_endpoint(run, sockets)]
        if run.transport.bind:
            arguments += ["--endpoint", run.transport.bind]
        for service in services:
            arguments += ["--rewards", service]
        learner = learner_spec(folder, "grpo", *arguments)
        required = {"reward server"} if servers else set[str]()
        if not run.transport.bind:
            required.add("actor")
        helpers = [*servers, *actor_specs(run, endpoint)]
        return supervise(folder, run, learner, helpers, frozenset(required))


if __name__ == "__main__":
    main(body)
