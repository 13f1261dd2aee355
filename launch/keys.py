"""Make a folder of CURVE keys, which sockets that leave this machine need: `launch/keys.py FOLDER`.

Then set `transport.keys` in the recipe, and give `--keys` to actors elsewhere, whose hosts need
server.public, actor.public and actor.secret.
"""

import argparse
import sys

from protocol.errors import ChannelError
from protocol.transport.curve_keys import ACTOR_PUBLIC, ACTOR_SECRET, SERVER_PUBLIC, make_keys


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="made with mode 0700; must not hold keys yet")
    options = parser.parse_args(arguments)
    try:
        folder = make_keys(options.folder)
    except (ChannelError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"Keys are in {folder}: set transport.keys to that folder in the recipe.")
    print(f"Actors elsewhere need {SERVER_PUBLIC}, {ACTOR_PUBLIC} and {ACTOR_SECRET} from it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
