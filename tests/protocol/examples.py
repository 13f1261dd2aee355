"""One valid message of each kind, for the tests of the wire and the channel."""

from protocol.arrays import floats_bytes, ids_bytes
from protocol.messages import (
    Ack,
    ActorMessage,
    Applied,
    Cancel,
    Chunk,
    Failed,
    Fetch,
    Group,
    Heartbeat,
    Hello,
    LearnerMessage,
    Policy,
    Refuse,
    Release,
    Request,
    Stop,
    Task,
    Welcome,
)
from protocol.parts import Completion, PolicySpan, RewardResult, RewardService, Sampling, TaskId
from protocol.reward_messages import RewardFault

TASK = TaskId(run="r", incarnation="i", number=7)
COMPLETION = Completion(
    token_ids=ids_bytes([5, 6, 2]),
    behaviour_logprobs=floats_bytes([-0.5, -1.25, 0.0]),
    policy_spans=[
        PolicySpan(start=0, version=3, digest="d3"),
        PolicySpan(start=2, version=4, digest="d4"),
    ],
    finish_reason="stop",
)
GROUP = Group(
    task=TASK,
    attempt=1,
    actor_id="a",
    actor_incarnation="x",
    learner_incarnation="i",
    completions=[COMPLETION, COMPLETION],
    reward=RewardResult(
        names=["f"],
        rewards=floats_bytes([1.0, float("nan")]),
        log_extra={"answer": ["4", None]},
        faults=[RewardFault(function="f", kind="timeout", message="after 1 s")],
    ),
    started_at=1.0,
    finished_at=2.5,
    generation_s=1.0,
    reward_s=0.5,
)
ACTOR_MESSAGES: list[ActorMessage] = [
    Hello(protocol_version=1, actor_id="a", actor_incarnation="x"),
    Request(free_rows=8),
    Release(reason="bye"),
    GROUP,
    Failed(task=TASK, attempt=2, reason="prompt too long"),
    Applied(version=3, digest="d3"),
    Heartbeat(progress=12, tokens_per_s=3.5),
]
LEARNER_MESSAGES: list[LearnerMessage] = [
    Welcome(
        protocol_version=1,
        run="r",
        incarnation="i",
        model={"path": "p", "lora": {"rank": 8}},
        model_digest="m",
        tokenizer_digest="t",
        rewards=[RewardService(endpoints=["ipc:///tmp/r"], timeout_s=60.0)],
        heartbeat_s=2.0,
        seed=42,
    ),
    Refuse(code="model", reason="another base", fatal=True),
    Task(
        task=TASK,
        attempt=1,
        kind="train",
        prompt_ids=ids_bytes([1, 2]),
        row=b'{"prompt":"1+1"}',
        sampling=Sampling(num_generations=2, max_completion_length=8),
        seed=1,
        min_policy_version=3,
        lease_s=60.0,
    ),
    Cancel(task=TASK, attempt=1),
    Ack(task=TASK, attempt=1),
    Policy(version=3, digest="d3", size=10, path="/tmp/p"),
    Stop(reason="done"),
]
SNAPSHOT_MESSAGES = [
    Fetch(version=3, digest="d3", offset=0, length=4),
    Chunk(version=3, digest="d3", offset=0, total=10, data=b"abcd"),
]
