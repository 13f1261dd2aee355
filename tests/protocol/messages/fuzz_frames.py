r"""Send random frames and mutated messages to a socket that must survive them.

Example: `python tests/protocol/messages/fuzz_frames.py ipc:///tmp/x/learner \
    --frames 1000000 --mutated 1000`
At most a few frames wait in this process at any time, so its memory is bounded. A receiver may
lose what it had not read when the sender hangs up; with `--hold` the sender hangs up only when its
standard input ends, so that every frame can be counted.
"""

import argparse
import random
import sys
import time

import msgspec
import zmq

from protocol.errors import ChannelError
from protocol.messages import wire
from protocol.messages.rewards import ScoreRequest
from protocol.transport.curve_keys import load_client_keys
from protocol.transport.endpoints import check_endpoint
from tests.protocol.examples import ACTOR_MESSAGES

SEND_HWM = 16
SCORE = ScoreRequest(
    id="fuzz", prompts=["1+1="] * 2, completions=["2", "3"], completion_ids=[[5], [6]]
)


def random_frame(rng: random.Random) -> bytes:
    """Draw up to 256 random bytes; one frame in 1,000 is up to 64 KiB."""
    longest = 65_536 if rng.random() < 0.001 else 256
    return rng.randbytes(rng.randrange(longest))


def mutated_message(rng: random.Random, valid: list[bytes]) -> bytes:
    """Change 1 to 8 bytes of a valid message; half of them are cut as well."""
    data = bytearray(rng.choice(valid))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.5 else data)


def open_dealer(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: str
) -> zmq.Socket[bytes]:
    """Connect a DEALER that holds few frames."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, SEND_HWM)
    socket.setsockopt(zmq.RCVHWM, SEND_HWM)
    socket.setsockopt(zmq.SNDTIMEO, 30_000)
    socket.setsockopt(zmq.LINGER, 30_000)
    if keys:
        loaded = load_client_keys(keys)
        socket.setsockopt(zmq.CURVE_SERVERKEY, loaded.server)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, loaded.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, loaded.secret)
    socket.connect(endpoint)
    return socket


def send_all(
    socket: zmq.Socket[bytes], valid: list[bytes], frames: int, mutated: int, seed: int
) -> int:
    """Send everything, taking answers as they come; return how many answers came."""
    rng = random.Random(seed)
    answers = 0
    for number in range(frames + mutated):
        is_random = number < frames
        data = random_frame(rng) if is_random else mutated_message(rng, valid)
        if rng.random() < 0.01:
            socket.send_multipart([data, rng.randbytes(8)])
        else:
            socket.send(data)
        while socket.poll(0):
            socket.recv_multipart()
            answers += 1
    return answers


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description="Send bad frames to a socket.")
    parser.add_argument("endpoint", help="ipc://path or tcp://host:port")
    parser.add_argument("--frames", type=int, default=1_000_000, help="random frames")
    parser.add_argument("--mutated", type=int, default=1_000, help="mutated valid messages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rewards", action="store_true", help="the socket is a reward server's")
    parser.add_argument("--keys", default="", help="folder of CURVE keys with one actor's pair")
    parser.add_argument("--hold", action="store_true", help="stay until standard input ends")
    options = parser.parse_args(arguments)
    valid = [wire.encode(message) for message in ACTOR_MESSAGES]
    if options.rewards:
        valid = [msgspec.json.encode(SCORE)]
    started = time.monotonic()
    try:
        check_endpoint(options.endpoint, keys=bool(options.keys))
        with (
            zmq.Context() as context,
            open_dealer(context, options.endpoint, options.keys) as socket,
        ):
            answers = send_all(socket, valid, options.frames, options.mutated, options.seed)
            if options.hold:
                sys.stdin.read()
    except zmq.Again:
        print(f"{options.endpoint} took nothing for 30 s; is its process alive?", file=sys.stderr)
        return 1
    except ChannelError as error:
        print(error, file=sys.stderr)
        return 1
    elapsed_s = time.monotonic() - started
    print(
        f"sent {options.frames} random frames and {options.mutated} mutated messages to "
        f"{options.endpoint} in {elapsed_s:.1f} s; {answers} answers came"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
