"""The bounds on what a peer may say freely: names, texts, lists, and what reward functions log.

A name that is too long, or has characters that a terminal would act on, is refused when a message
is decoded, with its field. A text is cut and cleaned instead: an error's reason should arrive.
"""

from typing import Annotated

import msgspec

NAME_CHARS = 256
TEXT_CHARS = 2_000
LOG_EXTRA_BYTES = 4 << 20  # of one group, as JSON text
LOG_METRICS = 256  # numbers that reward functions log for one group
FUNCTIONS = 256
COMPLETIONS = 4_096  # of one group
SPANS = 4_096  # policy spans, or segments, of one completion
MESSAGE_BYTES = 64 << 20  # unless `transport.max_message_mb` says otherwise
CREDIT = 1 << 20  # completions that an actor has room for

# Control characters (C0, DEL, C1) move a terminal's cursor; U+2028, U+2029 and the bidirectional
# marks make a log read otherwise than it is written.
NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]*$"

Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS, pattern=NO_CONTROLS)]
Count = Annotated[int, msgspec.Meta(ge=0)]


def printable(text: str, chars: int = TEXT_CHARS, *, keep: str = "") -> str:
    """Return a text of at most `chars` characters that is safe to write to a terminal.

    What is not printable becomes a space, but for the characters in `keep`.
    """
    return "".join(c if c.isprintable() or c in keep else " " for c in text[:chars])
