"""Conversations as the text that a chat model was trained on: by its own template.

A template is a program that came with the weights. It runs in Jinja's sandbox, which keeps it from everything but its
arguments, in a process of its own, which bounds its time and memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.errors import DataError
from lmjax.hf.config_json import read_json
from lmjax.hf.symbols import special_tokens
from lmjax.record import files

_SECONDS, _BYTES = 10, 1 << 30  # for one conversation


class Template(NamedTuple):
    """What a directory of tokenizer files says about conversations."""

    source: str
    """Jinja."""
    symbols: dict[str, Any]
    """bos_token, eos_token and so on, which the template may name."""
    where: str
    """The directory, for messages."""


def load_template(directory: os.PathLike[str] | str) -> Template:
    """The template of `chat_template.jinja` or of `tokenizer_config.json`. Raises DataError where there is none."""
    located = files.locate(directory)
    path = located / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    found = settings.get("chat_template")
    if (located / "chat_template.jinja").exists():
        found = files.read_bytes(located / "chat_template.jinja").decode("utf-8", errors="replace")
    if isinstance(found, list):  # several templates by name, in older files
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise DataError(f"{located} has no chat template: the model was not made for chat; leave out --chat")
    return Template(found, special_tokens(settings), str(located))


def render(
    template: Template, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """The text of `messages`, each `{"role": ..., "content": ...}`; it spells the symbols (`Tokenizer.encode_symbols`).

    `add_generation_prompt` ends it where the assistant's answer begins; `variables` are what else a template may know
    (`tools`, `enable_thinking`, ...). The same text as transformers' `apply_chat_template`. Raises DataError for a
    template that is damaged, refuses the conversation, reaches for what the sandbox forbids, or does not end.
    """
    arguments = template.symbols | {
        "messages": [{key: value for key, value in one.items() if value is not None} for one in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    request = json.dumps({"source": template.source, "arguments": arguments | variables})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lmjax.hf.template_process", str(_SECONDS), str(_BYTES)]
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, env=environment, timeout=_SECONDS, check=False
        )
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise DataError(
            f"the chat template in {template.where} took more than {_SECONDS} s or {_BYTES >> 30} GiB; leave out --chat"
        ) from None
    if "error" in answer:
        raise DataError(f"the chat template in {template.where} failed: {answer['error']}")
    return answer["text"]
