"""One valid message of each kind, for the tests of the wire and the channel."""

from protocol.messages.arrays import floats_bytes
from protocol.messages.messages import (
    Ack,
    ActorMessage,
    Applied,
    Cancel,
    Chunk,
    Failed,
    Fetch,
    Heartbeat,
    Hello,
    LearnerMessage,
    Policy,
    Refuse,
    Release,
    Request,
    Stop,
)
from protocol.messages.parts import PolicySpan
from protocol.messages.rewards import RewardFault
from tests.protocol.builders import (
    a_completion,
    a_group,
    a_reward,
    a_task,
    a_welcome,
    task_id,
)

TASK = task_id(7)
COMPLETION = a_completion(
    [5, 6, 2],
    sampling_logprobs=floats_bytes([-0.5, -1.25, 0.0]),
    policy_spans=[
        PolicySpan(start=0, version=3, digest="d3"),
        PolicySpan(start=2, version=4, digest="d4"),
    ],
)
GROUP = a_group(
    [COMPLETION, COMPLETION],
    TASK,
    reward=a_reward(
        [1.0, float("nan")],
        log_extra=b'{"answer":["4",null]}',
        faults=[RewardFault(function="f", kind="timeout", message="after 1 s")],
    ),
)
ACTOR_MESSAGES: list[ActorMessage] = [
    Hello(protocol_version=4, actor_id="a", actor_incarnation="x"),
    Request(free_completions=8),
    Release(reason="bye"),
    GROUP,
    Failed(task=TASK, attempt=2, reason="prompt too long"),
    Applied(version=3, digest="d3"),
    Heartbeat(progress=12, tokens_per_s=3.5),
]
LEARNER_MESSAGES: list[LearnerMessage] = [
    a_welcome(model={"path": "p", "lora": {"rank": 8}}),
    Refuse(code="model", reason="another base", fatal=True),
    a_task(7),
    Cancel(task=TASK, attempt=1),
    Ack(task=TASK, attempt=1),
    Policy(version=3, digest="d3", size=10, path="/tmp/p"),
    Stop(reason="done"),
]
SNAPSHOT_MESSAGES = [
    Fetch(version=3, digest="d3", offset=0, length=4),
    Chunk(version=3, digest="d3", offset=0, total=10, data=b"abcd"),
]
