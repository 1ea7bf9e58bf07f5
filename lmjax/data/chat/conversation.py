"""Conversations as people write them down: one JSON object each, in one of three forms.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": "...", "response": "..."}
    {"instruction": "...", "input": "...", "response": "..."}

`input` may be missing or empty, `tools` too, and a response may be called output. Other fields are left alone.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmjax.errors import DataError

ASSISTANT = "assistant"


class Conversation(NamedTuple):
    """Turns as a template reads them."""

    messages: list[dict[str, Any]]
    """With `role` and `content`. A user's message of the third form has `instruction` and `input` apart, too."""
    tools: list[Any] | None = None

    @property
    def responses(self) -> list[int]:
        """The numbers of the assistant's messages."""
        return [number for number, message in enumerate(self.messages) if message["role"] == ASSISTANT]


def read_conversation(line: str) -> Conversation:
    """The conversation of a JSON text. Raises DataError for none, one without a response, or one that is empty."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}; each must be one JSON object") from None
    if not isinstance(record, dict):
        raise DataError(f"no conversation but {type(record).__name__}; each must be one JSON object")
    if "messages" in record:
        return _of_messages(record)
    if "prompt" in record:
        return Conversation([{"role": "user", "content": _text(record, "prompt")}, _response(record)])
    if "instruction" in record:
        return Conversation([_instruction(record), _response(record)])
    raise DataError(
        f"no conversation among its fields {sorted(record)[:8]}; give it messages, or prompt and response, or "
        "instruction and response"
    )


def _instruction(record: Mapping[str, Any]) -> dict[str, Any]:
    instruction = _text(record, "instruction")
    if record.get("input") in (None, ""):
        return {"role": "user", "content": instruction, "instruction": instruction}
    given = _text(record, "input")
    return {"role": "user", "content": f"{instruction}\n\n{given}", "instruction": instruction, "input": given}


def _response(record: Mapping[str, Any]) -> dict[str, Any]:
    name = "output" if "output" in record and "response" not in record else "response"
    return {"role": ASSISTANT, "content": _text(record, name)}


def _text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record.get(name), str):
        raise DataError(f"no string under {name!r} but {_kind(record, name)}")
    if not record[name].strip():
        raise DataError(f"its {name!r} is empty; fill it in, or remove the line")
    return record[name]


def _of_messages(record: Mapping[str, Any]) -> Conversation:
    messages, tools = record["messages"], record.get("tools")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"no list of messages under 'messages' but {_kind(record, 'messages')}")
    if not (tools is None or isinstance(tools, list)):
        raise DataError(f"no list under 'tools' but {_kind(record, 'tools')}")
    for number, message in enumerate(messages, 1):
        _check_message(number, message)
    conversation = Conversation(messages, tools or None)
    if not conversation.responses:
        raise DataError("no message of the assistant: there is nothing to learn; add one, or remove the line")
    return conversation


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"message {number} has no role: each is an object with role and content")
    content, calls = message.get("content"), message.get("tool_calls")
    if not (isinstance(content, str) or (content is None and calls)):
        raise DataError(f"message {number} has no text as content but {_kind(message, 'content')}")
    if message["role"] == ASSISTANT and not calls and not (content or "").strip():
        raise DataError(f"message {number}, the assistant's, is empty; fill it in, or remove the line")
    weight = message.get("weight", 1)
    if type(weight) not in (int, float) or not 0 <= weight <= 1 or round(weight, 2) != weight:
        raise DataError(
            f"message {number} has weight={weight!r}: it is a number from 0, not to be scored, to 1, with two decimals "
            "at most"
        )


def _kind(record: Mapping[str, Any], name: str) -> str:
    return type(record[name]).__name__ if name in record else f"fields {sorted(record)[:8]}"
