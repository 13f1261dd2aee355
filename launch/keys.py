"""Make CURVE keys, which sockets that leave this machine need: `launch/keys.py DIR --actor NAME`.

The folder gets the server's pair and one pair for each actor that is named; run it again to add
actors, also while a run goes on. Set `transport.keys` to the folder in the recipe. An actor's host
needs server.public, NAME.public and NAME.secret, and gives the folder that holds them as `--keys`.
To shut an actor out, remove its NAME.public from the learner's folder.
"""

import argparse
import sys

from protocol.errors import ChannelError
from protocol.transport.curve_keys import PUBLIC, SECRET, SERVER, make_keys


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="made with mode 0700 if it is not there")
    parser.add_argument(
        "--actor", nargs="+", action="extend", default=[], metavar="NAME", help="gets a key pair"
    )
    options = parser.parse_args(arguments)
    try:
        folder = make_keys(options.folder, options.actor)
    except (ChannelError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1

    print(f"Keys are in {folder}: set transport.keys to that folder in the recipe.")
    for name in options.actor:
        print(f"Copy to the machine of {name}: {SERVER}{PUBLIC} {name}{PUBLIC} {name}{SECRET}")
    if not options.actor:
        print(f"Add a pair for each actor elsewhere: launch/keys.py {folder} --actor NAME")
    return 0


if __name__ == "__main__":
    sys.exit(main())
