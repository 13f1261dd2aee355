"""Actors with room for completions, most room first."""

from bisect import bisect_left, insort
from dataclasses import dataclass, field

_Entry = tuple[int, int, bytes]  # room, negated; the order of joining; the peer


@dataclass
class CreditQueue:
    """Finds the peer that the next task goes to, without looking at the others.

    Sorted lists: to change a peer's room costs a binary search and a shift of memory.
    """

    _entries: dict[bytes, _Entry] = field(default_factory=dict[bytes, _Entry])
    _all: list[_Entry] = field(default_factory=list[_Entry])
    _idle: list[_Entry] = field(default_factory=list[_Entry])

    def put(self, peer: bytes, room: int, joined: int, *, idle: bool) -> None:
        """Set the room of a peer, which joined as the `joined`th; `idle`: it holds no lease."""
        self.remove(peer)
        entry = self._entries[peer] = (-room, joined, peer)
        insort(self._all, entry)
        if idle:
            insort(self._idle, entry)

    def remove(self, peer: bytes) -> None:
        """Forget a peer, if it is known."""
        entry = self._entries.pop(peer, None)
        if entry is not None:
            _discard(self._all, entry)
            _discard(self._idle, entry)

    def first(self, completions: int) -> bytes | None:
        """Return the peer with the most room that a task of so many completions can go to.

        If it fits nowhere, that is one that holds no lease: nobody would take it otherwise.
        """
        if self._all and -self._all[0][0] >= completions:
            return self._all[0][2]
        return self._idle[0][2] if self._idle else None


def _discard(entries: list[_Entry], entry: _Entry) -> None:
    index = bisect_left(entries, entry)
    if index < len(entries) and entries[index] == entry:
        del entries[index]
