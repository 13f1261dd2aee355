"""What the journal of a finished run costs: bytes per token, and its share of the steps' time.

    uv run python -m tests.benchmarks.journal_cost RUN

All entries of the run's journal are appended to another one, in writes as large as those of the
run were on average, and timed. Prints a line.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from learner.ledger.events import BatchConsumed
from learner.ledger.journal import Entry, JournalWriter, segments
from learner.ledger.journal_reader import JournalReader, read_header
from protocol.messages.messages import Group

ENTRIES_PER_WRITE = 4  # a group, its event, and those of the lease that follows


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    run: Path = parser.parse_args().run

    found = segments(run / "journal")
    header = read_header(found[0]) if found else None
    if header is None:
        raise SystemExit(f"{run / 'journal'}: required a journal")
    reader = JournalReader(run / "journal", header.first)
    entries: list[Entry] = [entry for _, entry in reader]
    if reader.end.damage:
        raise SystemExit(reader.end.damage)
    groups = [entry for entry in entries if isinstance(entry, Group)]
    tokens = sum(len(c.token_ids) // 4 for group in groups for c in group.completions)
    steps = sum(isinstance(entry, BatchConsumed) for entry in entries)
    size = sum(path.stat().st_size for path in found)

    with TemporaryDirectory(dir=run) as folder:
        writer = JournalWriter(Path(folder), header.identity, 0)
        began = time.perf_counter()
        for start in range(0, len(entries), ENTRIES_PER_WRITE):
            writer.append(entries[start : start + ENTRIES_PER_WRITE])
        seconds = time.perf_counter() - began
        writer.close()

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [line["time_s"] for line in lines if "loss" in line]
    per_step = (times[-1] - times[0]) / (len(times) - 1)
    print(
        f"{len(groups)} groups, {tokens} tokens, {steps} steps: {size / tokens:.1f} bytes per "
        f"token; {seconds / steps * 1e3:.2f} ms per step of {per_step * 1e3:.0f} ms: "
        f"{seconds / steps / per_step:.2%}"
    )


if __name__ == "__main__":
    main()
