"""What a child's log says of its failure."""

import re

# Our processes log `date time LEVEL message`; tracebacks and libraries write other lines.
_ERROR = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ERROR ")


def ending(text: str, count: int = 20) -> str:
    """Return at most `count` lines that say why a process failed: from its last ERROR on.

    The middle of a longer message is left out. Without an ERROR, the last lines are returned.
    """
    lines = text.splitlines()
    errors = [index for index, line in enumerate(lines) if _ERROR.match(line)]
    if not errors:
        return "\n".join(lines[-count:])
    return shortened("\n".join(lines[errors[-1] :]), count)


def shortened(text: str, count: int = 20) -> str:
    """Return `text`, without its middle where it has more than `count` lines."""
    lines = text.splitlines()
    if len(lines) <= count:
        return text

    half = count // 2
    return "\n".join([*lines[:half], f"… {len(lines) - 2 * half} lines …", *lines[-half:]])
