"""The flags without which no program starts."""

from protocol.config.settings import AnyRun, GrpoRun, PairsRun, PreferenceRun, SftRun

OFFLINE = ["--model.path=m", "--data.path=d"]
FLAGS: dict[type[AnyRun], list[str]] = {
    SftRun: OFFLINE,
    PreferenceRun: OFFLINE,
    GrpoRun: [*OFFLINE, "--rewards.functions=a.py:f"],
    PairsRun: [*OFFLINE, "--rewards.functions=a.py:f"],
}
