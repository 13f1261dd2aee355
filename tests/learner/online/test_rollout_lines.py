"""What reward functions logged reaches a rollout line as it is, or not at all."""

import msgspec
import pytest

from learner.data.prompts import Prompt
from learner.online.experience import PromptGroup
from learner.online.rollout_lines import rollout_line
from tests.protocol.builders import a_completion, a_group, a_reward


class Words:
    def decode(self, token_ids, *, skip_special_tokens):
        return " ".join(map(str, token_ids))


@pytest.mark.parametrize(
    ("logged", "written"),
    [
        (b'{"seen":["4",null]}', b'{"seen":["4",null]}'),
        (b'{\n "seen": ["a\\n"]\r\n}', b'{"seen":["a\\n"]}'),
        (b"", b"{}"),
        (b"[1]", b"{}"),
        (b'{"a":1}\n{"step":9}', b"{}"),
        (b'{"a":"\xff"}', b"{}"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"{}"),
    ],
)
def test_a_line_holds_what_was_logged_as_one_json_object(logged, written):
    reward = a_reward([1.0], log_extra=logged)
    item = PromptGroup(
        Prompt(row_key=0, prompt_ids=[2], row={"prompt": "p"}),
        a_group([a_completion([5])], reward=reward),
    )
    line = msgspec.json.encode(rollout_line(item, 3, Words(), 1))
    assert b'"log_extra":' + written + b"," in line
    assert b"\n" not in line
    assert msgspec.json.decode(line)["lengths"] == [1]
