"""Lets a process of ours open as many files as the system allows, whatever its libraries set."""

import resource
from contextlib import suppress

WANTED = 65_536
_MACOS_MOST = 10_240  # macOS refuses more, even where it says that there is no limit


def keep_open_files() -> None:
    """Raise the limit on open files to the hard limit, and keep libraries from lowering either.

    A learner holds a file per actor and socket. Importing mlx_lm sets the limits to 2,048 and
    4,096; a hard limit that was lowered cannot be raised again, so it has to be kept before.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (WANTED, _MACOS_MOST):
        within = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (within, hard))
            break

    set_limit = resource.setrlimit

    def never_lower(which: int, limits: tuple[int, int], /) -> None:
        if which != resource.RLIMIT_NOFILE or _is_raise(resource.getrlimit(which), limits):
            set_limit(which, limits)

    resource.setrlimit = never_lower


def _is_raise(now: tuple[int, int], limits: tuple[int, int]) -> bool:
    infinite = resource.RLIM_INFINITY
    return all(
        new == infinite or (old != infinite and new >= old)
        for old, new in zip(now, limits, strict=True)
    )
