"""Which actors keep sending groups that cannot be used, and are turned away for it."""

from collections import OrderedDict
from dataclasses import dataclass, field

# One bad group may be a fault of the moment, and a prompt whose groups are always bad is given up
# after `queue.max_attempts` (3) of them. More than two such prompts in a row are the actor's fault.
MAX_FAULTS = 8
MAX_NAMES = 4096


@dataclass
class Conduct:
    """Counts each actor's groups that could not be used, less those that could.

    Kept by name, so that an actor cannot shed its past by connecting again. Of names without a
    fault nothing is kept; beyond `MAX_NAMES`, the one that was at fault longest ago is forgotten.
    """

    _faults: OrderedDict[str, int] = field(default_factory=OrderedDict[str, int])

    def fault(self, name: str) -> None:
        """Count a group that could not be used."""
        faults = self._faults.pop(name, 0) + 1
        self._faults[name] = faults
        if len(self._faults) > MAX_NAMES:
            self._faults.popitem(last=False)

    def useful(self, name: str) -> None:
        """Count a group that was accepted."""
        faults = self._faults.get(name, 0)
        if 1 < faults < MAX_FAULTS:
            self._faults[name] = faults - 1
        elif faults == 1:
            del self._faults[name]

    def is_turned_away(self, name: str) -> bool:
        return self._faults.get(name, 0) >= MAX_FAULTS
