"""Connections that never become actors, for `tests/acceptance/attacks.py`. A program.

    python -m tests.acceptance.flood PORT COUNT SENT SOURCE

Opens COUNT connections from the address SOURCE to 127.0.0.1:PORT. SENT is `bare` (nothing) or
`half` (the greeting of a handshake, and no more). Prints how many could be opened and in how long,
and holds them until standard input ends.
"""

import resource
import socket
import sys
import time

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + b"\0" + bytes(31)
CONNECT_S = 10.0


def main() -> int:
    """Run the program."""
    port, count, sent, source = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    opened: list[socket.socket] = []
    started = time.monotonic()
    for _ in range(count):
        try:
            connection = socket.create_connection(("127.0.0.1", port), CONNECT_S, (source, 0))
            opened.append(connection)
            if sent == "half":
                connection.send(GREETING)
        except OSError:
            continue
    print(len(opened), round(time.monotonic() - started, 1), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
