"""Scores of finished answers: what a function is given, what its failures say, other servers."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.pages.judge import Judge
from protocol.errors import ChannelError, RewardError

ROOT = Path(__file__).resolve().parents[3]
REWARDS = """
import os

def words(prompts, completions, chosen=None, **kwargs):
    assert len(set(map(repr, prompts))) == 1
    return [None if not text else float(len(text.split())) for text in completions]

def said(completions, **kwargs):
    return [float(len(messages[0]["content"])) for messages in completions]

def exact(completions, answer, **kwargs):
    return [float(c == a) for c, a in zip(completions, answer)]

def against_chosen(completions, chosen, rejected, **kwargs):
    return [float(c == g) - float(c == b) for c, g, b in zip(completions, chosen, rejected)]

def rank(completions, **kwargs):
    return [float(sorted(completions).index(text)) for text in completions]

def broken(completions, **kwargs):
    return [1.0] * (len(completions) + 1)

def fails(completions, **kwargs):
    raise ValueError("no such luck")

def dies(completions, **kwargs):
    os._exit(3)
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(REWARDS)
    return path


def line(prompt, answer, **columns):
    return {"prompt": prompt, "completions": [answer], **columns}


def test_scores_by_contestant_and_prompt_without_none(rewards):
    contestants = {
        "a": {"p": line("p", "x y z"), "q": line("q", "")},
        "b": {"p": line("p", "x"), "r": line("r", "x y")},
        "c": {},
    }
    scores = Judge(f"{rewards}:words").scores(contestants)
    assert scores == {"a": {"p": 3.0}, "b": {"p": 1.0, "r": 2.0}, "c": {}}


def test_answers_to_a_prompt_are_one_group(rewards):
    contestants = {name: {"p": line("p", text)} for name, text in zip("abc", "zxy", strict=True)}
    scores = Judge(f"{rewards}:rank").scores(contestants)
    assert scores == {"a": {"p": 2.0}, "b": {"p": 0.0}, "c": {"p": 1.0}}


def test_columns_come_along_and_conversations_are_messages(rewards):
    pair = {"chosen": "good", "rejected": "bad"}
    contestants = {"a": {"p": line("p", "bad", **pair)}, "b": {"p": line("p", "good", **pair)}}
    scores = Judge(f"{rewards}:against_chosen").scores(contestants)
    assert scores == {"a": {"p": -1.0}, "b": {"p": 1.0}}
    given = {"columns": {"answer": "7", "prompt": "other"}}
    contestants = {"a": {"p": line("p", "7", **given)}, "b": {"p": line("p", "8", **given)}}
    assert Judge(f"{rewards}:exact").scores(contestants) == {"a": {"p": 1.0}, "b": {"p": 0.0}}
    chat = line([{"role": "user", "content": "p"}], "four")
    assert Judge(f"{rewards}:said").scores({"a": {"p": chat}}) == {"a": {"p": 4.0}}
    chosen = {**chat, "completions": [[{"role": "assistant", "content": "eleven"}]]}
    assert Judge(f"{rewards}:said").scores({"a": {"p": chat}, "b": {"p": chosen}}) == {
        "a": {"p": 4.0},
        "b": {"p": 6.0},
    }


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("broken", "broken: contract: .* more than 1 rewards, but 1 were required"),
        ("fails", "fails: exception: .*no such luck"),
        ("dies", "dies: died: the process that ran it ended 2 times"),
        ("missing", "has no 'missing'; it defines .*words"),
    ],
)
def test_a_failure_is_an_error_that_names_it(rewards, function, reason):
    with pytest.raises(RewardError, match=reason):
        Judge(f"{rewards}:{function}").scores({"a": {"p": line("p", "x")}})


def test_a_server_that_runs_already_scores_too(rewards):
    contestants = {"a": {"p": line("p", "x y")}}
    with _server(f"{rewards}:words", f"{rewards}:rank") as endpoint:
        judge = Judge(endpoint.replace("tcp://", "zmq://"))
        assert judge.scores(contestants) == {"a": {"p": 2.0}}
    with pytest.raises(ChannelError, match="CURVE keys are required"):
        Judge("zmq://10.0.0.1:7000").scores(contestants)


@contextmanager
def _server(*functions):
    command = [sys.executable, str(ROOT / "launch/reward_server.py"), *functions]
    command += ["--bind", "tcp://127.0.0.1:*"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
