"""Chat templates: how a conversation is written as text. Three known formats, a file, or the tokenizer's own.

A template is a Jinja program. Those here mark what the assistant writes, `{% generation %} ... {% endgeneration %}`,
with the end of its turn (what a model never learned to write, it cannot end with), and refuse what they have no words
for.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from lmjax.data.tokenizers.tokenizer import DESCRIPTION
from lmjax.errors import DataError
from lmjax.record import files

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"

# [instruction] ... [end] [response] ... [end], as in Chollet and Watson, Deep Learning with Python, third edition.
_INSTRUCTION = r"""
{%- if tools %}{{ raise_exception('it has no words for tools') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- ('' if loop.first else '\n') + '[instruction]\n' + message.content + '[end]\n' }}
    {%- elif message.role == 'assistant' and not message.tool_calls %}
        {{- '[response]\n' }}{% generation %}{{ message.content + '[end]' }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('it has no words for a message of ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[response]\n' }}{% endif %}
"""

# Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca, train.py: PROMPT_DICT, and the end of text after the output.
# A system message stands in place of the first sentence.
_ALPACA = r"""
{%- if tools %}{{ raise_exception('it has no words for tools') }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}
        {%- if loop.first %}
            {{- 'Below is an instruction that describes a task' }}
            {%- if message.input %}
                {{- ', paired with an input that provides further context' }}
            {%- endif %}
            {{- '. Write a response that appropriately completes the request.\n\n' }}
        {%- elif messages[loop.index0 - 1].role == 'assistant' %}
            {{- '\n\n' }}
        {%- endif %}
        {{- '### Instruction:\n' + (message.instruction or message.content) + '\n\n' }}
        {%- if message.input %}
            {{- '### Input:\n' + message.input + '\n\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' and not message.tool_calls %}
        {{- '### Response:' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('it has no words for a message of ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:' }}{% endif %}
"""

# OpenAI's, as chatml.md in github.com/openai/openai-python described it.
_CHATML = r"""
{%- if tools %}{{ raise_exception('it has no words for tools') }}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}{{ raise_exception('it has no words for calls of tools') }}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

TEMPLATES: dict[str, str] = {
    "instruction": _INSTRUCTION,
    "alpaca": _ALPACA,
    "chatml": _CHATML,
}
OWN = "tokenizer"
"""Names the template that came with the tokenizer."""


class Template(NamedTuple):
    """A template, and what it may name."""

    source: str
    """Jinja."""
    symbols: dict[str, Any]
    """bos_token, eos_token and so on, which the template may name."""
    where: str
    """Whose it is, for messages."""

    @property
    def hash(self) -> str:
        """Names all that fixes the texts that it writes."""
        return files.hash_bytes(self.source.encode(), b"\n", json.dumps(self.symbols, sort_keys=True).encode())


def find_template(name: str, origin: epath.Path, saved: epath.Path) -> Template:
    """The template of this name (of `TEMPLATES`, `tokenizer`, or a file of Jinja) for a tokenizer that came from the
    directory `origin` and is saved in another. Raises DataError where there is no such template."""
    symbols = _symbols(saved) | special_tokens(_object(origin / SETTINGS))
    if name == OWN:
        return load_template(origin)._replace(symbols=symbols)
    if name in TEMPLATES:
        return Template(TEMPLATES[name], symbols, f"lmjax ({name})")
    return Template(_text(files.locate(name)), symbols, name)


def load_template(directory: str | os.PathLike[str]) -> Template:
    """The template of `chat_template.jinja` or of `tokenizer_config.json`. Raises DataError where there is none."""
    located = files.locate(directory)
    found = _object(located / SETTINGS).get("chat_template")
    if (located / FILE).exists():
        found = _text(located / FILE)
    if isinstance(found, list):  # several templates by name, in older files
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise DataError(f"{located} has no chat template: the model was not made for chat; name one, or leave out chat")
    return Template(found, _symbols(located), str(located))


def save_template(template: Template, origin: epath.Path, saved: epath.Path) -> None:
    """Write it beside the tokenizer, as `find_template` has them, so that `load_template` finds it there, with what
    names its symbols. Raises DataError when it cannot be written."""
    if (origin / SETTINGS).exists():
        files.write_bytes(saved / SETTINGS, files.read_bytes(origin / SETTINGS))
    files.write_bytes(saved / FILE, template.source.encode())


def _symbols(directory: epath.Path) -> dict[str, str]:
    """What tokenizer_config.json names, and where that names no eos_token, the endoftext of a tokenizer saved here."""
    endoftext = _object(directory / DESCRIPTION).get("endoftext")
    ending = {"eos_token": endoftext} if isinstance(endoftext, str) else {}
    return ending | special_tokens(_object(directory / SETTINGS))


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}` of a tokenizer_config.json, where a token is a string or an object that holds it."""
    spelled = {name: token.get("content") if isinstance(token, dict) else token for name, token in settings.items()}
    return {name: token for name, token in spelled.items() if name.endswith("_token") and isinstance(token, str)}


def _object(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        values = json.loads(files.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({str(error)[:100]}); restore the file") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object; restore the file")
    return values


def _text(path: epath.Path) -> str:
    return files.read_bytes(path).decode("utf-8", errors="replace")
