"""What learner and actor share when they are one process (`actors.colocate`)."""

from dataclasses import dataclass, field

from protocol.model.policy_shelf import PolicyShelf
from protocol.transport.bridge import Bridges
from protocol.transport.memory_channel import MemoryChannel


@dataclass(frozen=True)
class InProcess:
    """The channel between them, the policies that pass over, and what their main thread waits for.

    Both have an I/O thread of their own, with a bridge among `bridges`.
    """

    channel: MemoryChannel = field(default_factory=MemoryChannel)
    shelf: PolicyShelf = field(default_factory=PolicyShelf)
    bridges: Bridges = field(default_factory=Bridges)
