"""What became of every leased training task, from the journal's events, not from the ledger."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.acceptance.run import check

Json = dict[str, Any]


@dataclass
class Accounts:
    """The training tasks of one learner incarnation, by number.

    `trained` holds (task, version that its batch made); `open`, the batch formed but not consumed.
    """

    joined: dict[int, Any] = field(default_factory=dict[int, Any])  # number: row
    leased: Counter[int] = field(default_factory=Counter[int])  # attempts
    received: list[int] = field(default_factory=list[int])
    trained: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    dropped: dict[int, str] = field(default_factory=dict[int, str])
    closed: Counter[str] = field(default_factory=Counter[str])  # leases without a group, by cause
    discarded: Counter[str] = field(default_factory=Counter[str])  # groups, by reason
    open: list[int] = field(default_factory=list[int])
    evaluation: set[int] = field(default_factory=set[int])


def incarnations(journal: Iterable[Json]) -> dict[str, list[Json]]:
    """Return the events of each incarnation, in the order of their first events."""
    found: dict[str, list[Json]] = {}
    for line in journal:
        found.setdefault(line["incarnation"], []).append(line["event"])
    return found


def account(events: Iterable[Json], rejoined: dict[int, Any] | None = None) -> Accounts:
    """Follow every training task; `rejoined` are those that a resume brought: row by number."""
    books = Accounts(joined=dict(rejoined or {}))
    for event in events:
        _enter(books, event)
    return books


def _enter(books: Accounts, event: Json) -> None:
    kind, number = event["type"], event.get("number")
    if kind == "Joined" and event["kind"] != "train":
        books.evaluation.add(event["number"])
    if number in books.evaluation:
        return
    match kind:
        case "Joined":
            books.joined[event["number"]] = event["row_key"]
        case "Leased":
            books.leased[event["number"]] += 1
        case "Received":
            books.received.append(event["number"])
        case "Discarded":
            books.discarded[event["reason"]] += 1
        case "Closed":
            books.closed[event["cause"]] += 1
        case "Dropped":
            books.dropped[event["number"]] = f"{event['cause']}: {event['detail']}"
        case "Formed":
            check(not books.open, "a batch was formed while another trained")
            books.open = event["numbers"]
        case "Consumed":
            books.trained += [(task, event["version"]) for task in books.open]
            books.open = []
        case "Returned":
            books.open = []
        case _:
            pass


def check_complete(books: Accounts, *, left: int = 0) -> None:
    """Every leased task was trained or dropped, once; only duplicates were thrown away.

    `left`: how many of the newest tasks may wait, in the checkpoint of a run that was stopped.
    """
    trained = Counter(number for number, _ in books.trained)
    twice = [number for number, count in trained.items() if count > 1]
    check(not twice, f"tasks {twice} were trained more than once")
    both = trained.keys() & books.dropped.keys()
    check(not both, f"tasks {sorted(both)} were trained and dropped")
    lost = books.leased.keys() - trained.keys() - books.dropped.keys()
    newest = set(sorted(books.joined)[len(books.joined) - left :])
    check(lost <= newest, f"leased tasks {sorted(lost)} were neither trained nor dropped")
    never = trained.keys() - books.leased.keys()
    check(not never, f"tasks {sorted(never)} were trained without a lease")
    check(all(books.dropped.values()), "a task was dropped without a reason")
    other = {r: n for r, n in books.discarded.items() if r not in ("duplicate", "dropped")}
    check(not other, f"groups that are no duplicates were discarded: {other}")
