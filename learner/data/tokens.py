"""Text and conversations to token IDs, as TRL 1.16.0 does (`trl/data_utils.py`, `_tokenize`).

Plain strings are encoded with the special tokens that the tokenizer adds by itself, conversations
by its chat template with nothing added. A tokenizer is transformers' or mlx-lm's TokenizerWrapper
around one.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from learner.data.rows import Json, Row, RowError, check_text
from protocol.errors import DataError

Tokenizer: TypeAlias = Any  # transformers' or mlx-lm's; neither is typed
Messages = list[dict[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return transformers' tokenizer, unwrapped from mlx-lm's wrapper.

    The wrapper adds `enable_thinking` to every template call, which TRL does not. A wrapper whose
    template is a Python function instead of Jinja stays as it is.
    """
    wrappers = sys.modules.get("mlx_lm.tokenizer_utils")
    if wrappers is None or not isinstance(tokenizer, wrappers.TokenizerWrapper):
        return tokenizer
    return tokenizer if _has_template_function(tokenizer) else tokenizer._tokenizer


def _has_template_function(tokenizer: Tokenizer) -> bool:
    return getattr(tokenizer, "_chat_template", None) is not None


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token IDs of plain text, with the special tokens that the tokenizer adds."""
    return list(plain_tokenizer(tokenizer).encode(text))


def check_messages(messages: Json, where: str) -> Messages:
    """Return messages without null fields; raise RowError for those that no template accepts.

    Arrow adds fields that other messages have, as nulls; templates would take them for set.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError("mixed_types", f"{where} must be a list of messages, not {_type(messages)}")
    if not messages:
        raise RowError("empty", f"{where} holds no message")

    checked: Messages = []
    for index, message in enumerate(cast("Sequence[Any]", messages)):
        at = f"{where}[{index}]"
        if not isinstance(message, Mapping):
            raise RowError("mixed_types", f"{at} must be a message, not {_type(message)}")

        fields = cast("Mapping[str, Any]", message)
        content, calls = fields.get("content"), fields.get("tool_calls")
        role = fields.get("role")
        if role not in ROLES:
            raise RowError(
                "invalid_role", f"{at}.role is {role!r}; it must be one of {list(ROLES)}"
            )
        if not (calls is None or _all_mappings(calls)):
            raise RowError(
                "mixed_types", f"{at}.tool_calls must be a list of calls, each a mapping"
            )
        _check_content(content, at, required=not calls)

        checked.append({k: _without_nulls(v) for k, v in fields.items() if v is not None})
        checked[-1].setdefault("content", content)  # templates read it, even beside tool calls
    return checked


def _all_mappings(value: Json) -> bool:
    items = cast("list[Any]", value)
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in items)


def _check_content(content: Json, at: str, *, required: bool) -> None:
    if content is None and not required:
        return
    if isinstance(content, str):
        check_text(content, f"{at}.content")
        return
    if not isinstance(content, list):
        raise RowError("mixed_types", f"{at}.content must be text, not {_type(content)}")

    for part in cast("list[Any]", content):
        kind = cast("Any", part).get("type") if isinstance(part, Mapping) else _type(part)
        if kind != "text":
            raise RowError(
                "unsupported", f"{at}.content has a {kind!r} part; only text can be trained"
            )
        check_text(str(cast("Any", part).get("text") or ""), f"{at}.content")


def _without_nulls(value: Json) -> Json:
    """Return a copy of nested mappings and lists, without the nulls of mappings."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {key: _without_nulls(item) for key, item in items if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in cast("list[Any]", value)]
    return value


def template_options(row: Row) -> dict[str, Any]:
    """Return a row's keyword arguments for the chat template: `tools`, `chat_template_kwargs`.

    Either column may be a JSON string, because Arrow cannot hold rows of different structure.
    """
    kwargs = _loaded(row, "chat_template_kwargs", Mapping) or {}
    tools = _loaded(row, "tools", list) or None  # some templates announce even an empty list
    return {**_without_nulls(kwargs), "tools": _without_nulls(tools)}


def _loaded(row: Row, column: str, kind: type) -> Json:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError("mixed_types", f"{column} is not valid JSON: {error}") from None

    if value is not None and not isinstance(value, kind):
        raise RowError(
            "mixed_types", f"{column} must be a {kind.__name__.lower()}, not {_type(value)}"
        )
    return value


def render_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    options: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> list[int]:
    """Return the token IDs of a conversation under the tokenizer's chat template.

    Raises DataError without a template, and RowError if the template refuses the messages.
    """
    from jinja2.exceptions import TemplateError

    plain = plain_tokenizer(tokenizer)
    by_function = _has_template_function(plain)
    if not by_function and not plain.chat_template:
        raise DataError(
            "the dataset holds chat messages, but the tokenizer has no chat template; set "
            "model.chat_template to a Jinja file, or use plain strings as prompts"
        )

    extra = {} if by_function else {"return_dict": True}
    try:
        rendered = plain.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **extra,
            **options,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise RowError("template", f"the chat template refuses the messages: {error}") from error
    return list(rendered if by_function else rendered["input_ids"])


def render_prompt(tokenizer: Tokenizer, row: Row) -> list[int]:
    """Return the token IDs of `row["prompt"]`, a string or messages.

    A user or tool turn is followed by the generation prompt; an assistant turn is continued. The
    columns `tools` and `chat_template_kwargs` apply. Raises RowError, or DataError if no row of the
    dataset can be rendered.
    """
    prompt = row.get("prompt")
    if prompt is None:
        raise RowError("missing_column", f"no prompt; the row has {sorted(row)}")

    if isinstance(prompt, str):
        ids = encode(tokenizer, check_text(prompt, "prompt"))
    else:
        messages = check_messages(prompt, "prompt")
        last = messages[-1]["role"]
        if last not in ("user", "tool", "assistant"):
            raise RowError(
                "invalid_role",
                f"the prompt ends with a {last!r} message; it must end with a user or tool turn "
                "to answer or an assistant turn to continue",
            )
        ids = render_chat(
            tokenizer,
            messages,
            template_options(row),
            add_generation_prompt=last != "assistant",
            continue_final_message=last == "assistant",
        )

    if not ids:
        raise RowError("empty", "the prompt has no tokens")
    return ids


def _type(value: Json) -> str:
    return "null" if value is None else type(value).__name__
