"""Policies for an actor in the learner's process: handed over by reference, without a file."""

# pyright: reportMissingTypeStubs=false
# (mlx is only partly typed)

from dataclasses import dataclass, field

import mlx.core as mx

from protocol.errors import SnapshotError


@dataclass
class PolicyShelf:
    """The trainable tensors of published policies, until the actor takes them or a newer one.

    It holds as many versions as sampling may lag behind: a policy is announced only when the actor
    may take it. Learner and actor use it from the one thread that holds MLX. Arrays are immutable,
    so a later update of the learner's model leaves them as they were.
    """

    _held: dict[int, tuple[str, dict[str, mx.array]]] = field(
        default_factory=dict[int, tuple[str, dict[str, mx.array]]]
    )

    def put(self, version: int, digest: str, arrays: dict[str, mx.array]) -> None:
        """Offer the tensors of a version, by name; `digest` is theirs."""
        self._held[version] = digest, arrays

    def take(self, version: int, digest: str) -> dict[str, mx.array]:
        """Return the tensors of a version, and drop it and all older ones.

        Raises SnapshotError if it is not there, or has another digest.
        """
        found, arrays = self._held.get(version, ("", {}))
        if not arrays or found != digest:
            raise SnapshotError(
                f"policy version {version}: required the tensors with digest {digest[:12]}, which "
                f"the learner announced, got {found[:12] or 'none'}; versions held: "
                f"{sorted(self._held)}"
            )

        self._held = {held: item for held, item in self._held.items() if held > version}
        return arrays
