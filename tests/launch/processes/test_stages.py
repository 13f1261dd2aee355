"""How long a start took, by stage, and the words for it."""

from launch.processes.stages import Stages
from protocol.run_record import StartUp


def test_stages_follow_each_other_and_add_up():
    now = 10.0
    stages = Stages("learner", lambda: now)
    for name, at, ago in (
        ("imports", 12.5, 0.0),
        ("model", 13.0, 0.0),
        ("first batch", 20.0, 1.5),
        ("first step", 20.0, 0.0),
        ("model", 20.25, 0.0),
        ("data", 20.25, 3.0),  # cannot have ended before the stage before it
    ):
        now = at
        stages.done(name, ago)

    event = stages.event()
    assert isinstance(event, StartUp)
    assert event.process == "learner"
    assert list(event.parts.items()) == [
        ("imports", 2.5), ("model", 0.75), ("first batch", 5.5), ("first step", 1.5), ("data", 0.0),
    ]  # fmt: skip


def test_the_event_names_the_result_and_the_parts():
    parts = {"imports": 2.5, "first batch": 5.54, "first step": 1.5}
    event = StartUp(process="learner", parts=parts)
    assert event.text == (
        "learner: first step after 9.5 s (imports 2.5, first batch 5.5, first step 1.5)"
    )
