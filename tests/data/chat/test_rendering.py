"""Chat templates: the text that transformers makes of a conversation, and templates that try to do something else."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lmjax.data.chat.rendering import Renderer, render
from lmjax.data.chat.templates import Template, load_template
from lmjax.errors import DataError

pytest.importorskip("jinja2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# In the words of no published template, with the constructs of each family's.
TEMPLATES = {
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\n\nToday: " + date_string + "\n" }}{{- system_message }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}
""",
    "qwen": """{%- if tools %}
    {{- '<|start|>system\nTools:' }}
    {%- for tool in tools %}{{ "\n" }}{{ tool | tojson }}{% endfor %}
    {{- '<|end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<x>') and message.content.endswith('</x>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- if loop.index0 > ns.last_query_index %}{{- '<|start|>assistant\n<think>\n' }}{%- endif %}
        {% generation %}{{ content }}{% endgeneration %}
    {%- else %}
        {{- '<|start|>' + message.role + '\n' + message.content + '<|end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}""",
    "gemma": """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}{% endif %}
    {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<turn>' + role + '\n' + message['content'] | trim + '</turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<turn>model\n'}}{% endif %}
""",
    "mistral": """{%- set loop_messages = messages %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- if message.role == "stop" %}{% break %}{% endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {{- "[Q] " + message["content"] + "[/Q]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("only user and assistant roles") }}
    {%- endif %}
{%- endfor %}{{ ns.index }} {{ {'b': 'é<', 'a': [1, none, true]} | tojson(indent=2) }} {{ unk_token is defined }}""",
}
SYMBOLS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATIONS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([{"role": "user", "content": " Hello, <b>you</b> & 'them'! "}], {"add_generation_prompt": True}),
    (
        [
            {"role": "user", "content": "a", "tool_calls": None},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
            {"role": "user", "content": "c\n"},
        ],
        {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 Jan"},
    ),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ünï"}], {}),
]


def template(source: str) -> Template:
    return Template(source, SYMBOLS, "DIR")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), chat_template=TEMPLATES[name], **SYMBOLS
    )
    rendered = 0
    for messages, variables in CONVERSATIONS:
        try:
            expected = peer.apply_chat_template(messages, tokenize=False, **variables)
        except Exception as error:
            with pytest.raises(DataError, match=str(error)):
                render(template(TEMPLATES[name]), messages, **variables)
            continue
        assert render(template(TEMPLATES[name]), messages, **variables) == expected
        rendered += 1
    assert rendered >= 2


def test_what_the_sandbox_hides_is_empty() -> None:
    assert render(template("{{ '{0.__class__}'.format(1) }}"), [{"role": "user", "content": "x"}]) == ""


def test_a_template_knows_the_time() -> None:
    turn = [{"role": "user", "content": ""}]
    assert len(render(template("{{ strftime_now('%d %b %Y') }}"), turn)) == 11
    dated = "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}"
    with Renderer(template(dated), clock=False) as renderer:  # what is prepared is the same on any day
        assert renderer.render(turn).text == "26 Jul 2024"
    with (
        Renderer(template("{{ strftime_now('%Y') }}"), clock=False) as renderer,
        pytest.raises(DataError, match="'strftime_now' is undefined"),
    ):
        renderer.render(turn)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.__init__.__globals__ }}", "SecurityError|UndefinedError"),
        ("{{ (messages|attr('append'))({}) }}", "SecurityError"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "may not set"),
        ("{{ raise_exception.__globals__['os'].system('touch pwned') }}", "SecurityError|UndefinedError"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took more than"),
        ("{{ ('a' * 10**10)|length }}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ undefined.attribute }}", "'undefined' is undefined"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_hostile_and_broken_templates_fail_in_one_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmjax.data.chat.rendering._SECONDS", 2)
    with pytest.raises(DataError, match=message) as caught:
        render(template(source), [{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and "DIR" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_time_of_a_template_is_that_of_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what passes while the machine does something else: it is stopped in its work, for longer than it may take."""
    monkeypatch.setattr("lmjax.data.chat.rendering._SECONDS", 1)
    loops = "{% for a in range(4000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}"
    with Renderer(template(loops + "{{ messages[0].content }}")) as renderer:
        process = renderer._process

        def ticks() -> int:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        def stop_in_its_work() -> None:
            before = ticks()
            while ticks() < before + 2:
                time.sleep(0.001)
            process.send_signal(signal.SIGSTOP)
            time.sleep(1.5)
            process.send_signal(signal.SIGCONT)

        renderer._ask({"source": "", "arguments": {}, "clock": True})  # it has started
        stopping = threading.Thread(target=stop_in_its_work)
        stopping.start()
        assert renderer.render([{"role": "user", "content": "y"}]).text == "y"
        stopping.join()


def test_where_a_template_is_found(tmp_path: Path) -> None:
    def settings(**values: Any) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))

    with pytest.raises(DataError, match="has no chat template"):
        load_template(tmp_path)
    settings(bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>", model_max_length=5)
    with pytest.raises(DataError, match="has no chat template"):
        load_template(tmp_path)
    settings(chat_template="one", eos_token="</s>", pad_token=None, add_bos_token=True)
    assert load_template(tmp_path) == Template("one", {"eos_token": "</s>"}, str(tmp_path))
    settings(chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}])
    assert load_template(tmp_path).source == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert load_template(tmp_path).source == "three"


def test_without_jinja_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(DataError, match=r"needs an extra, install lmjax\[hf\]"):
        render(template("x"), [{"role": "user", "content": "x"}])
