"""Print the JSON schema of the reward wire: `python launch/reward_schema.py > rewards.json`.

For reward servers in other languages; protocol/REWARDS.md describes what the messages mean.
"""

import sys

import msgspec

from protocol.messages.rewards import (
    REWARD_PROTOCOL_VERSION,
    ScoreProgress,
    ScoreRefusal,
    ScoreReply,
    ScoreRequest,
)


def schema() -> bytes:
    """Return the schema (JSON Schema 2020-12) of every message, each under `$defs`."""
    wire = msgspec.json.schema(ScoreRequest | ScoreReply | ScoreProgress | ScoreRefusal)
    title = f"Pippin reward wire, version {REWARD_PROTOCOL_VERSION}"
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title}
    return msgspec.json.format(msgspec.json.encode(head | wire), indent=2)


def main() -> int:
    """Print the schema."""
    sys.stdout.write(schema().decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
