"""Serve reward functions: `launch/reward_server.py FUNCTION… --bind ENDPOINT [--keys DIR]`.

FUNCTION is `path/to/file.py:function` or `package.module:function`; ENDPOINT is `tcp://host:port`
or `ipc://path`. A run uses it as `zmq://host:port` among its `rewards.functions`. The wire
format is described in protocol/REWARDS.md; `--schema` prints its JSON schema, for servers in other
languages.
"""

import argparse
import logging
import sys

import anyio
import anyio.to_thread
import msgspec

from actors.rewards.server import RewardServer
from launch.processes.start import Lifeline, start_process
from protocol.errors import PippinError, only_leaf
from protocol.messages.rewards import (
    REWARD_PROTOCOL_VERSION,
    ScoreProgress,
    ScoreRefusal,
    ScoreReply,
    ScoreRequest,
)

log = logging.getLogger("pippin.rewards")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("functions", nargs="*", metavar="FUNCTION")
    parser.add_argument("--bind", default="", metavar="ENDPOINT")
    parser.add_argument("--keys", default=None, metavar="DIR", help="made by launch/keys.py")
    parser.add_argument("--child", action="store_true", help="end when standard input closes")
    parser.add_argument("--schema", action="store_true", help="print the wire's JSON schema only")
    args = parser.parse_args()
    if not args.schema and not (args.functions and args.bind):
        parser.error("give at least one FUNCTION, and --bind ENDPOINT")
    return args


def schema() -> str:
    """Return the schema (JSON Schema 2020-12) of every message, each under `$defs`."""
    wire = msgspec.json.schema(ScoreRequest | ScoreReply | ScoreProgress | ScoreRefusal)
    title = f"Pippin reward wire, version {REWARD_PROTOCOL_VERSION}"
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return msgspec.json.format(msgspec.json.encode(head | wire), indent=2).decode()


async def serve(args: argparse.Namespace, lifeline: Lifeline) -> None:
    """Serve until asked to stop."""
    async with RewardServer(args.functions, args.bind, keys=args.keys) as server:
        print(f"serving {', '.join(server.names)} at {server.endpoint}", flush=True)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            try:
                await anyio.to_thread.run_sync(lifeline.wait, abandon_on_cancel=True)
            finally:
                lifeline.request_stop()  # an abandoned thread would keep the process alive
            tasks.cancel_scope.cancel()

        if server.refusals:
            log.info("refused: %s", dict(server.refusals))


def main() -> int:
    """Serve; exit status 1 if the functions or the endpoint cannot be used."""
    args = arguments()
    if args.schema:
        print(schema())
        return 0

    lifeline = start_process(child=args.child, mlx=False)
    status = 0
    try:
        anyio.run(serve, args, lifeline)
    except* PippinError as group:
        error = only_leaf(group)
        log.error("%s: %s", type(error).__name__, error)
        status = 1
    except* KeyboardInterrupt:
        log.info("interrupted")
    return status


if __name__ == "__main__":
    sys.exit(main())
