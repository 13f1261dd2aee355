"""Attack a real run over its tcp sockets, and check that it goes on. A program.

    python -m tests.acceptance.attacks [--connections 5000] [--dir runs]

One run of launch/grpo.py with keys and a local actor is flooded on each of its three sockets, by
connections that send nothing and by others that begin a handshake; meanwhile an actor joins over
tcp. Then come an impostor, a liar, messages that are too large, and a key that is withdrawn. Last,
a reward server reports progress forever. Prints the figures; exit status 1 if a check fails.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import msgspec
import zmq
import zmq.asyncio

from actors.rewards.client import MAX_WAITS, RewardClient
from learner.online.conduct import MAX_FAULTS
from protocol.messages.arrays import floats_bytes, ids_bytes
from protocol.messages.limits import LOG_EXTRA_BYTES
from protocol.messages.messages import (
    PROTOCOL_VERSION,
    Group,
    Hello,
    LearnerMessage,
    Policy,
    Refuse,
    Release,
    Request,
    Task,
    Welcome,
)
from protocol.messages.parts import Completion, PolicySpan, RewardResult, RewardService
from protocol.transport.channel import Client
from protocol.transport.connections import MAX_CONNECTIONS, UNSEEN
from protocol.transport.curve_keys import load_client_keys, make_keys
from protocol.transport.endpoints import ipc_folder
from tests.acceptance.run import ROOT, CheckFailed, Launcher, check, lines, resident_mb

SOCKETS = ("tasks", "snapshots", "rewards")
FLOOD_S = 180.0
ANSWER_S = 20.0
ASK_AGAIN_S = 2.0


def launch(folder: Path, keys: Path, port: int) -> Launcher:
    """Start a run that goes on until it is interrupted."""
    flags: dict[str, Any] = {
        "run.dir": folder.parent,
        "run.name": folder.name,
        "run.log_completions": 0,
        "data.eval_path": "",
        "eval.steps": 0,
        "train.batch_size": 8,
        "train.micro_batch_size": 8,
        "train.max_steps": 100_000,
        "queue.max_staleness": 1,
        "actors.max_concurrent_completions": 32,
        "transport.bind": f"tcp://127.0.0.1:{port}",
        "transport.keys": keys,
    }
    return Launcher(folder, [f"--{key}={value}" for key, value in flags.items()])


class RemoteActor:
    """An actor played by hand, over tcp with its key; it samples nothing."""

    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name
        self.tasks: list[Task] = []
        self.policy: Policy | None = None

    async def join(self, actor_id: str = "") -> Welcome | Refuse:
        """Ask for the terms, then say Hello with the digests in them."""
        hello = Hello(
            protocol_version=PROTOCOL_VERSION,
            actor_id=actor_id or self.name,
            actor_incarnation="attack",
        )
        answer = await self._ask(hello)
        if isinstance(answer, Refuse):
            return answer
        digests = {
            "model_digest": answer.model_digest,
            "tokenizer_digest": answer.tokenizer_digest,
        }
        return await self._ask(msgspec.structs.replace(hello, **digests))

    async def _ask(self, hello: Hello) -> Welcome | Refuse:
        """Say Hello until it is answered, as an actor does."""
        with anyio.fail_after(ANSWER_S, reason=f"no answer to Hello for {ANSWER_S:g} s"):
            while True:
                self.client.send(hello)
                with anyio.move_on_after(ASK_AGAIN_S):
                    answer = await self.hear(Welcome, Refuse)
                    assert isinstance(answer, Welcome | Refuse)
                    return answer

    async def hear(self, *kinds: type[LearnerMessage]) -> LearnerMessage:
        """Return the next message of these kinds; note tasks and policies on the way."""
        with anyio.fail_after(ANSWER_S, reason=f"no answer among {kinds} for {ANSWER_S:g} s"):
            while True:
                message = await self.client.receive()
                if isinstance(message, Task):
                    self.tasks.append(message)
                if isinstance(message, Policy):
                    self.policy = message
                if isinstance(message, kinds):
                    return message

    async def task(self) -> Task:
        """Return a lease, asking for it if there is none."""
        if not self.tasks:
            self.client.send(Request(free_completions=8))
            await self.hear(Task)
        return self.tasks.pop(0)

    def group(self, task: Task, logprob: float, log_extra: bytes = b"{}") -> Group:
        """Make a finished group of one token per completion."""
        digest = self.policy.digest if self.policy is not None else ""
        span = PolicySpan(start=0, version=task.min_policy_version, digest=digest)
        completion = Completion(
            token_ids=ids_bytes([1]),
            sampling_logprobs=floats_bytes([logprob]),
            policy_spans=[span],
            finish_reason="stop",
        )
        count = task.sampling.num_generations
        rewards = floats_bytes([1.0] * count)
        return Group(
            task=task.task,
            attempt=task.attempt,
            actor_id=self.name,
            actor_incarnation="attack",
            learner_incarnation=task.task.incarnation,
            completions=[completion] * count,
            reward=RewardResult(names=["exact_match"], rewards=rewards, log_extra=log_extra),
            started_at=0.0,
            finished_at=1.0,
            generation_s=1.0,
            reward_s=0.0,
        )


def open_files(pid: int) -> int:
    """Return how many files a process has open."""
    proc = Path(f"/proc/{pid}/fd")
    if proc.exists():
        return len(list(proc.iterdir()))
    listing = subprocess.run(["lsof", "-p", str(pid)], capture_output=True, text=True, check=False)
    return len(listing.stdout.splitlines())


def start_flood(port: int, sent: str, args: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """Start a flood; its output can be read without waiting."""
    command = [sys.executable, "-m", "tests.acceptance.flood", str(port)]
    command += [str(args.connections), sent, args.source]
    pipe = subprocess.PIPE
    attacker = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, bufsize=0)
    assert attacker.stdout is not None
    os.set_blocking(attacker.stdout.fileno(), False)
    return attacker


async def flood(
    run: Launcher, keys: Path, port: int, which: int, sent: str, args: argparse.Namespace
) -> None:
    """Flood a socket while an actor joins again and again, and the run trains."""
    name = ("learn.py", "learn.py", "reward_server.py")[which]
    found = run.child(name)
    assert found is not None
    pid, steps, joined, slowest, files, memory = found[0], len(run.steps()), 0, 0.0, 0, 0.0
    attacker = start_flood(port + which, sent, args)
    assert attacker.stdout is not None

    started, told = time.monotonic(), b""
    while not told:
        check(time.monotonic() - started < FLOOD_S, f"{sent} flood: not over in {FLOOD_S:g} s")
        asked = time.monotonic()
        async with Client(f"tcp://127.0.0.1:{port}", keys=load_client_keys(keys, "studio")) as c:
            answer = await RemoteActor(c, "studio").join()
        check(isinstance(answer, Welcome), f"an actor must be welcomed, got {answer}")
        joined, slowest = joined + 1, max(slowest, time.monotonic() - asked)
        files, memory = max(files, open_files(pid)), max(memory, resident_mb(pid))
        told = attacker.stdout.read() or b""

    # The run must train on while the connections are held.
    run.until(lambda: len(run.steps()) >= steps + 3, f"3 steps during the {sent} flood")
    attacker.communicate()
    opened, took_s = told.decode().split()
    check(int(opened) == args.connections, f"{opened} of {args.connections} could connect")
    bound = 2 * (MAX_CONNECTIONS + UNSEEN)
    check(files < bound, f"{files} files open, required less than {bound}")
    print(
        f"{SOCKETS[which]:9} {sent}: {opened} connections in {took_s} s from {args.source}; "
        f"{joined} joins, slowest {slowest:.2f} s; {len(run.steps()) - steps} steps; at most "
        f"{files} files and {memory:.0f} MiB",
        flush=True,
    )


async def impostor(keys: Path, port: int) -> None:
    """Claim another's name with one's own key."""
    async with Client(f"tcp://127.0.0.1:{port}", keys=load_client_keys(keys, "liar")) as client:
        answer = await RemoteActor(client, "liar").join("studio")
    check(isinstance(answer, Refuse) and answer.code == "key" and answer.fatal, str(answer))
    print(f"impostor: refused ({getattr(answer, 'reason', '')})", flush=True)


async def large(run: Launcher, keys: Path, port: int) -> None:
    """Send groups whose `log_extra` would take seventy times its size as values."""
    found = run.child("learn.py")
    assert found is not None
    before, refused = resident_mb(found[0]), 0
    async with Client(f"tcp://127.0.0.1:{port}", keys=load_client_keys(keys, "studio")) as client:
        actor = RemoteActor(client, "studio")
        await actor.join()
        task = await actor.task()
        for size in [LOG_EXTRA_BYTES, 6 << 20] * 8:
            text = b'{"a":[' + b"[]," * ((size - 10) // 3) + b"1]}"
            # Of no task that there is: it must be read, not trained.
            nothing = msgspec.structs.replace(task.task, number=10**9)
            group = msgspec.structs.replace(actor.group(task, -0.5, text), task=nothing)
            client.send(group)
            if len(text) > LOG_EXTRA_BYTES:
                answer = await actor.hear(Refuse)
                assert isinstance(answer, Refuse)
                check("reward.log_extra" in answer.reason, answer.reason)
                refused += 1
        client.send(Release(reason="done"))  # or the run waits for its lease to expire
    grown = resident_mb(found[0]) - before
    check(grown < 200, f"the learner's memory grew by {grown:.0f} MiB")
    print(f"large: {refused} groups of 6 MiB of log_extra refused; +{grown:.0f} MiB", flush=True)


async def liar(run: Launcher, keys: Path, port: int) -> None:
    """Send groups with log-probs above 0 until turned away."""
    async with Client(f"tcp://127.0.0.1:{port}", keys=load_client_keys(keys, "liar")) as client:
        actor, sent = RemoteActor(client, "liar"), 0
        check(isinstance(await actor.join(), Welcome), "a liar is welcome until it lies")
        while True:
            client.send(actor.group(await actor.task(), 0.5))
            sent += 1
            answer = await actor.hear(Refuse)
            assert isinstance(answer, Refuse)
            check(sent <= MAX_FAULTS, f"{sent} bad groups, and still not turned away")
            if sent == MAX_FAULTS:
                answer = await actor.hear(Refuse)
                assert isinstance(answer, Refuse)
                break
        check(answer.code == "turned_away" and answer.fatal, str(answer))
    async with Client(f"tcp://127.0.0.1:{port}", keys=load_client_keys(keys, "liar")) as client:
        again = await RemoteActor(client, "liar").join()
    check(isinstance(again, Refuse), f"a liar must stay away, got {again}")
    run.until(lambda: "turned away" in run.output.read_text(), "word of the liar in the terminal")
    said = run.output.read_text().count("is turned away")
    check(said == 1, f"the terminal must say it once, said it {said} times")
    print(f"liar: turned away after {sent} groups; the terminal says so once", flush=True)


async def shut_out(keys: Path, port: int) -> None:
    """Remove an actor's key while it is connected."""
    pair = load_client_keys(keys, "studio")
    async with Client(f"tcp://127.0.0.1:{port}", keys=pair) as client:
        actor = RemoteActor(client, "studio")
        check(isinstance(await actor.join(), Welcome), "studio is admitted")
        (keys / "studio.public").unlink()
        started = time.monotonic()
        while True:
            client.send(Request(free_completions=0))
            with anyio.move_on_after(0.2):
                answer = await actor.hear(Refuse)
                break
        check(isinstance(answer, Refuse) and answer.code == "key", str(answer))
    print(f"key removed: refused after {time.monotonic() - started:.1f} s", flush=True)


async def endless(limit_s: float = 1.0) -> None:
    """Have a reward server report progress forever."""
    started = time.monotonic()
    results: list[RewardResult] = []
    with ipc_folder() as folder:
        endpoint = f"ipc://{folder}/r"

        async def serve() -> None:
            with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as server:
                server.linger = 0
                server.bind(endpoint)
                while True:
                    peer, data = await server.recv_multipart()
                    asked = msgspec.json.decode(data)
                    reply = {"type": "progress", "id": asked["id"], "ahead": 1}
                    if not asked["completions"]:
                        reply = {"type": "rewards", "id": asked["id"], "names": ["f"]}
                        reply["rewards"] = [[]]
                    await server.send_multipart([peer, msgspec.json.encode(reply)])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            services = [RewardService(endpoints=[endpoint], timeout_s=limit_s / 4)]
            async with RewardClient(services, resend_s=0.1, slack_s=limit_s / 2) as client:
                results.append(await client.score(b"{}", ["a"], [[1]], {}))
            tasks.cancel_scope.cancel()
    waited, (result,) = time.monotonic() - started, results
    check(result.faults[0].kind == "unreachable", str(result.faults))
    check(waited < (MAX_WAITS + 1) * limit_s, f"waited {waited:.1f} s")
    print(f"endless progress: given up after {waited:.1f} s; one turn has {limit_s:g} s")


def free_port() -> int:
    """Return a port that is free, with the two above it, in all likelihood."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1]) % 20_000 + 10_000


async def attack(args: argparse.Namespace) -> None:
    """Make all attacks on one run."""
    folder = args.dir / f"attacks-{time.strftime('%H%M%S')}-{os.getpid()}"
    keys = make_keys(folder.with_name(f"{folder.name}.keys"), ["studio", "liar"])
    port = free_port()
    run = launch(folder, keys, port)
    try:
        run.until(lambda: len(run.steps()) >= 3, "step 3")
        for which in range(len(SOCKETS)):
            for sent in ("bare", "half"):
                await flood(run, keys, port, which, sent, args)
        await impostor(keys, port)
        await large(run, keys, port)
        await liar(run, keys, port)
        await shut_out(keys, port)

        done = len(run.steps())
        run.until(lambda: len(run.steps()) >= done + 3, "3 steps after the attacks")
        counted = {k: v for k, v in run.steps()[-1].items() if "refused" in k or "invalid" in k}
        print(f"counted: {counted}", flush=True)
        errors = [line for line in lines(folder / "events.jsonl") if line["event"] == "Restart"]
        check(not errors, f"no process may be restarted, got {errors}")
        run.process.send_signal(signal.SIGINT)
        run.wait(120)
    finally:
        run.end()


def main() -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=5000, help="per flood")
    parser.add_argument("--source", default="127.0.0.1", help="the address they come from")
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="of the run folder")
    args = parser.parse_args()
    args.dir = args.dir.resolve()
    try:
        anyio.run(endless)
        anyio.run(attack, args)
    except (CheckFailed, TimeoutError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
