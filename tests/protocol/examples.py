"""One valid message of each kind, for the tests of the wire and the channel."""

from protocol import messages as m

TASK = m.TaskId(run="r", incarnation="i", number=7)
COMPLETION = m.Completion(
    token_ids=m.ids_bytes([5, 6, 2]),
    behaviour_logprobs=m.floats_bytes([-0.5, -1.25, 0.0]),
    policy_spans=[
        m.PolicySpan(start=0, version=3, digest="d3"),
        m.PolicySpan(start=2, version=4, digest="d4"),
    ],
    finish_reason="stop",
)
GROUP = m.Group(
    task=TASK,
    attempt=1,
    actor_id="a",
    actor_incarnation="x",
    learner_incarnation="i",
    completions=[COMPLETION, COMPLETION],
    reward=m.RewardResult(
        names=["f"],
        rewards=m.floats_bytes([1.0, float("nan")]),
        log_extra={"answer": ["4", None]},
        faults=[m.RewardFault(function="f", kind="timeout", message="after 1 s")],
    ),
    started_at=1.0,
    finished_at=2.5,
    generation_s=1.0,
    reward_s=0.5,
)
ACTOR_MESSAGES: list[m.ActorMessage] = [
    m.Hello(protocol_version=1, actor_id="a", actor_incarnation="x"),
    m.Request(free_rows=8),
    m.Release(reason="bye"),
    GROUP,
    m.Failed(task=TASK, attempt=2, reason="prompt too long"),
    m.Applied(version=3, digest="d3"),
    m.Heartbeat(progress=12, tokens_per_s=3.5),
]
LEARNER_MESSAGES: list[m.LearnerMessage] = [
    m.Welcome(
        protocol_version=1,
        run="r",
        incarnation="i",
        model={"path": "p", "lora": {"rank": 8}},
        model_digest="m",
        tokenizer_digest="t",
        rewards=[m.RewardService(endpoints=["ipc:///tmp/r"], timeout_s=60.0)],
        heartbeat_s=2.0,
        seed=42,
    ),
    m.Refuse(code="model", reason="another base", fatal=True),
    m.Task(
        task=TASK,
        attempt=1,
        kind="train",
        prompt_ids=m.ids_bytes([1, 2]),
        row=b'{"prompt":"1+1"}',
        sampling=m.Sampling(num_generations=2, max_completion_length=8),
        seed=1,
        min_policy_version=3,
        lease_s=60.0,
    ),
    m.Cancel(task=TASK, attempt=1),
    m.Ack(task=TASK, attempt=1),
    m.Policy(version=3, digest="d3", size=10, path="/tmp/p"),
    m.Stop(reason="done"),
]
SNAPSHOT_MESSAGES = [
    m.Fetch(version=3, digest="d3", offset=0, length=4),
    m.Chunk(version=3, digest="d3", offset=0, total=10, data=b"abcd"),
]
