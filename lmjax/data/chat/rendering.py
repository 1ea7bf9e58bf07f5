"""Conversations as the text that a template makes of them.

A template is a program that came with the weights. It runs in Jinja's sandbox, which keeps it from everything but its
arguments, in a process of its own, which bounds its time and memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from lmjax.data.chat.templates import Template
from lmjax.errors import DataError

_SECONDS, _BYTES = 10, 1 << 30  # of processor time and memory, for one conversation

Messages = Sequence[Mapping[str, Any]]
"""Each `{"role": ..., "content": ...}`."""


class Rendering(NamedTuple):
    """What a template makes of some messages."""

    text: str
    """It spells the symbols (`Tokenizer.encode_symbols`)."""
    marked: list[list[int]] | None
    """What the template says that the assistant wrote, as ranges of characters; None for a template without marks."""


class Renderer:
    """A template in its process, for as long as the context lasts."""

    def __init__(self, template: Template, *, clock: bool = True) -> None:
        """Without a clock a template cannot write the day's date: the same conversations then give the same text."""
        self.template, self._clock = template, clock

    def __enter__(self) -> Self:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "lmjax.data.chat.template_process", str(_SECONDS), str(_BYTES)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def render(self, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any) -> Rendering:
        """`add_generation_prompt` ends the text where the assistant's answer begins; `variables` are what else a
        template may know (`tools`, `enable_thinking`, ...). The same text as transformers' `apply_chat_template`.

        Raises DataError for a template that is damaged, refuses the conversation, reaches for what the sandbox forbids,
        or does not end.
        """
        template = self.template
        arguments = template.symbols | {
            "messages": [{key: value for key, value in one.items() if value is not None} for one in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._ask({"source": template.source, "arguments": arguments | variables, "clock": self._clock})
        if answer is None:
            raise DataError(
                f"the chat template in {template.where} took more than {_SECONDS} s of work or {_BYTES >> 30} GiB; use "
                "another"
            )
        if "error" in answer:
            raise DataError(f"the chat template in {template.where} failed: {answer['error']}")
        return Rendering(answer["text"], answer["marked"])

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer; None where the process ended over it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None


def render(template: Template, messages: Messages, *, add_generation_prompt: bool = False, **variables: Any) -> str:
    """The text of one conversation, as `Renderer.render` makes it."""
    with Renderer(template) as renderer:
        return renderer.render(messages, add_generation_prompt=add_generation_prompt, **variables).text
