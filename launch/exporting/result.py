"""What an export made, and could not make."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Exported:
    """What was written to `folder`, with notes on what could not be."""

    folder: Path
    gguf: Path | None = None
    modelfile: Path | None = None
    notes: list[str] = field(default_factory=list[str])
    failed: bool = False
