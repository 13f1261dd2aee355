"""What a child's log says to the user while it runs, and when it fails."""

from pathlib import Path

from launch.processes.log_ending import LogTail, ending

AT = "2026-01-02 03:04:05,678"


def test_messages_are_shown_once_whole_and_without_errors_or_tracebacks(tmp_path: Path):
    path = tmp_path / "learner.log"
    path.write_text(f"{AT} INFO an earlier run\n")
    tail = LogTail(path)
    with path.open("a") as log:
        log.write(f"{AT} INFO d.jsonl: 3 rows kept\nTraceback of a library\n{AT} WARN")
        log.flush()
        assert tail.read() == ["d.jsonl: 3 rows kept"]
        log.write(f"ING slow\n{AT} ERROR shown at the end\n{AT} INFO saved x\n")
    assert tail.read() == ["slow"]
    assert tail.read() == []
    assert LogTail(tmp_path / "none").read() == []


def test_long_lists_of_bad_rows_are_cut_across_reads(tmp_path: Path):
    path = tmp_path / "learner.log"
    tail = LogTail(path)
    shown: list[str] = []
    with path.open("a") as log:
        for row in range(9):
            log.write(f"{AT} INFO     row {row}: no chosen\n")
            log.flush()
            shown += tail.read()
        log.write(f"{AT} INFO   dropped for empty: 1\n{AT} INFO     row 9: empty\n")
    shown += tail.read()
    assert shown == [
        *(f"    row {row}: no chosen" for row in range(5)),
        f"    … all of them: {path}",
        "  dropped for empty: 1",
        "    row 9: empty",
    ]


def test_the_ending_begins_at_the_last_error_and_keeps_both_its_ends():
    lines = [f"line {index}" for index in range(30)]
    assert ending("\n".join(lines), 3) == "line 27\nline 28\nline 29"
    logged = [f"{AT} ERROR first", *lines, f"{AT} ERROR none of 99 rows", "a", "b", "c", "d"]
    assert ending("\n".join(logged)).splitlines() == logged[-5:]
    assert ending("\n".join(logged), 4).splitlines() == [
        f"{AT} ERROR none of 99 rows",
        "a",
        "… 1 lines …",
        "c",
        "d",
    ]
