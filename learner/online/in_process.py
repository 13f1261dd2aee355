"""What learner and actor share when they are one process (`actors.colocate`)."""

from dataclasses import dataclass, field

from protocol.messages.messages import Welcome
from protocol.model.policy_shelf import PolicyShelf
from protocol.transport.bridge import Bridges
from protocol.transport.memory_channel import MemoryChannel


@dataclass
class InProcess:
    """The channel between them, the policies that pass over, and what their main thread waits for.

    Both have an I/O thread of their own, with a bridge among `bridges`. `welcome` are the terms
    that the learner gives every actor, once it has worked them out.
    """

    channel: MemoryChannel = field(default_factory=MemoryChannel)
    shelf: PolicyShelf = field(default_factory=PolicyShelf)
    bridges: Bridges = field(default_factory=Bridges)
    welcome: Welcome | None = None
