"""What a child's log says of its failure."""

from launch.processes.children import ending

AT = "2026-01-02 03:04:05,678"


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
