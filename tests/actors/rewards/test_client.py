"""The client against real servers and against sockets that answer as the test says."""

import json
import math
import os
import re
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import numpy as np
import pytest
import zmq
import zmq.asyncio

from actors.rewards.client import RewardClient
from actors.rewards.server import RewardServer
from protocol.messages.arrays import floats_view
from protocol.messages.parts import RewardService

pytestmark = pytest.mark.anyio
SAMPLES = Path(__file__).with_name("sample_rewards.py")


@asynccontextmanager
async def serving(endpoint, *functions):
    names = [f"{SAMPLES}:{name}" for name in functions]
    async with RewardServer(names, endpoint) as server, anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        yield server
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def client(*services, timeout_s=20.0, resend_s=0.2, slack_s=10.0, **options):
    specs = [RewardService(endpoints=list(e), timeout_s=timeout_s) for e in services]
    with anyio.fail_after(40):
        async with RewardClient(specs, resend_s=resend_s, slack_s=slack_s, **options) as scorer:
            yield scorer


async def score(scorer, row=None, completions=("a", "bbb")):
    row = json.dumps({"prompt": "p", **(row or {})}).encode()
    ids = [[1]] * len(completions)
    return await scorer.score(row, list(completions), ids, {"global_step": 3})


def table(result):
    return floats_view(result.rewards).reshape(-1, len(result.names)).tolist()


async def until(condition):
    """Wait for what another process does."""
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - no event crosses processes
            await anyio.sleep(0.01)


async def scored_by(answers, **options):
    """Return the result of one score, from endpoints that answer as `answers` says."""
    results = []
    async with anyio.create_task_group() as tasks:
        for endpoint, answer in answers.items():
            await tasks.start(fake, endpoint, answer)
        async with client(list(answers), **options) as scorer:
            results.append(await score(scorer))
        tasks.cancel_scope.cancel()
    return results[0]


async def fake(endpoint, answer, names=("f",), *, task_status):
    """Answer every request that has completions with `answer(request)`."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        socket.bind(endpoint)
        task_status.started()
        while True:
            peer, data = await socket.recv_multipart()
            request = json.loads(data)
            head = {"type": "rewards", "id": request["id"], "names": list(names)}
            reply = head | {"rewards": [[] for _ in names]}
            if request["completions"]:
                reply = answer(request)
                if isinstance(reply, dict):
                    reply = head | reply
            if reply is not None:
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                await socket.send_multipart([peer, data])


async def test_services_side_by_side_under_unique_names(folder):
    a, b = f"ipc://{folder}/a", f"ipc://{folder}/b"
    async with (
        serving(a, "length", "logs", "mostly_none"),
        serving(b, "length", "logs_too", "of_column", "step"),
        client([a], [b]) as scorer,
    ):
        result = await score(scorer, {"answer": "b"})
    names = ["length", "logs", "mostly_none", "length_2", "logs_too", "of_column", "step"]
    assert result.names == names
    first, second = table(result)
    assert math.isnan(first[2])
    assert [*first[:2], *first[3:]] == [1.0, 0.0, 1.0, 0.0, 0.0, 3.0]
    assert second == [3.0, 0.0, 2.0, 3.0, 0.0, 1.0, 3.0]
    assert result.log_extra == b'{"seen":["a","bbb",0,0]}'
    assert result.log_metric == {"logs/accuracy": 1.0, "logs_too/accuracy": 0.0}
    assert result.faults == []


async def test_a_service_never_heard_of_leaves_no_columns(folder):
    a, gone = f"ipc://{folder}/a", f"ipc://{folder}/gone"
    async with serving(a, "length"), client([a], [gone], timeout_s=0.2, slack_s=0.2) as scorer:
        result = await score(scorer)
        assert (result.names, result.rewards) == ([], b"")
        assert [(f.function, f.kind) for f in result.faults] == [(gone, "unreachable")]
        async with serving(gone, "step"):
            later = await score(scorer)
            while not later.names:
                later = await score(scorer)
        assert later.names == ["length", "step"]
        assert table(later) == [[1.0, 3.0], [3.0, 3.0]]
        lost = await score(scorer)
        assert lost.names == ["length", "step"]
        np.testing.assert_array_equal(table(lost), [[1.0, np.nan], [3.0, np.nan]])
        assert [f.kind for f in lost.faults] == ["unreachable"]


async def test_two_endpoints_share_the_load(folder, tmp_path):
    os.mkfifo(tmp_path / "go")
    a, b = f"ipc://{folder}/a", f"ipc://{folder}/b"
    row = {"folder": str(tmp_path)}
    results = []
    async with serving(a, "waits"), serving(b, "waits"), client([a, b]) as scorer:

        async def one():
            results.append(await score(scorer, row))

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(one)
            await until(lambda: len(_calls(tmp_path)) == 2)  # both at once, in a process each
            async with await anyio.open_file(tmp_path / "go", "wb"):
                pass
    assert [table(r) for r in results] == [[[5.0], [5.0]]] * 2
    assert len(set(_calls(tmp_path))) == 2


def _calls(folder):
    path = folder / "calls"
    return path.read_text().split() if path.exists() else []


async def test_a_slow_reward_is_asked_for_at_one_endpoint_while_it_says_progress(folder):
    asked, strayed = [], []

    def slow(request):
        asked.append(request["id"])
        return {"type": "progress"} if len(asked) < 3 else {"rewards": [[1.0, 2.0]]}

    def idle(request):
        strayed.append(request["id"])

    # An answer that takes longer than this on a busy machine would be taken for silence.
    result = await scored_by({f"ipc://{folder}/a": slow, f"ipc://{folder}/b": idle}, resend_s=1.5)
    assert table(result) == [[1.0], [2.0]]
    assert len(asked) == 3
    assert len(set(asked)) == 1
    assert strayed == []


async def test_a_server_that_reports_progress_forever_is_timed_out(folder):
    asked = []

    def never(request):
        asked.append(request["id"])
        return {"type": "progress", "ahead": 1}

    options = {"timeout_s": 0.1, "slack_s": 0.3, "resend_s": 0.1, "max_waits": 3}
    started = anyio.current_time()
    result = await scored_by({f"ipc://{folder}/a": never}, **options)
    waited = anyio.current_time() - started
    assert [fault.kind for fault in result.faults] == ["unreachable"]
    assert "gave no answer within 1.5" in result.faults[0].message
    assert np.isnan(table(result)).all()
    assert 1.5 <= waited < 5  # three times the half second that one turn may take
    assert len(asked) > 5  # progress beyond one turn's time: each report gave it another


async def test_a_silent_endpoint_gives_way_to_another(folder):
    silent = []
    a, b = f"ipc://{folder}/a", f"ipc://{folder}/b"
    answers = {a: lambda r: silent.append(r), b: lambda _: {"rewards": [[1.0, 2.0]]}}
    assert table(await scored_by(answers)) == [[1.0], [2.0]]
    assert len(silent) == 1


async def test_a_server_started_again_in_mid_request_still_answers(folder, tmp_path):
    os.mkfifo(tmp_path / "go")
    a = f"ipc://{folder}/a"
    results = []
    async with client([a]) as scorer, anyio.create_task_group() as tasks:

        async def one():
            results.append(await score(scorer, {"folder": str(tmp_path)}))

        async with serving(a, "waits"):
            tasks.start_soon(one)
            await until(lambda: _calls(tmp_path))
        async with serving(a, "waits"):
            await until(lambda: len(_calls(tmp_path)) == 2)
            async with await anyio.open_file(tmp_path / "go", "wb"):
                pass
            await until(lambda: results)
    assert table(results[0]) == [[5.0], [5.0]]
    assert results[0].faults == []


async def test_a_refusal_for_lack_of_room_is_tried_again(folder):
    asked = []

    def answer(request):
        asked.append(request["id"])
        if len(asked) < 3:
            return {"type": "refused", "reason": "full", "retry": True}
        return {"rewards": [[1.0, 2.0]]}

    result = await scored_by({f"ipc://{folder}/a": answer})
    assert table(result) == [[1.0], [2.0]]
    assert len(asked) == 3
    assert len(set(asked)) == 1


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"rewards": [[1.0]]}, "gave 1 rewards of 'f' for 2 completions"),
        ({"rewards": [[1.0, 1.0], [1.0, 1.0]]}, "2 lists of rewards for 1 names"),
        ({"names": ["g"], "rewards": [[1.0, 1.0]]}, r"functions \['g'\], earlier for \['f'\]"),
        ({"rewards": [[1.0, 1e39]]}, "1e\\+39 of 'f', which float32 cannot hold"),
        ({"rewards": [["1.0", 1.0]]}, "invalid reply"),
        ({"type": "refused", "reason": "not today"}, "refused: not today"),
    ],
)
async def test_a_reply_that_breaks_the_contract_is_a_fault(folder, reply, words):
    result = await scored_by({f"ipc://{folder}/a": lambda _: reply})
    np.testing.assert_array_equal(table(result), [[np.nan], [np.nan]])
    (fault,) = result.faults
    assert (fault.function, fault.kind) == ("f", "contract")
    assert re.search(words, fault.message), fault.message


async def test_a_score_that_begins_while_all_is_cancelled_touches_no_closed_socket(tmp_path):
    endpoint = f"ipc://{tmp_path}/r"
    async with serving(endpoint, "length"), client([endpoint]) as scorer:
        await score(scorer)  # the names are known from now on
    with anyio.CancelScope() as scope:
        scope.cancel()
        await score(scorer)
    assert scope.cancelled_caught
