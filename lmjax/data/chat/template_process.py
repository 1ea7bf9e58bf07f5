"""The process that renders a chat template: `python -m lmjax.data.chat.template_process SECONDS BYTES`.

It reads a line of JSON for each rendering and answers with one, see rendering.py, and ends with its standard input. It
imports nothing of ours, so that it starts at once and has nothing that a template could reach. SECONDS are of its own
work, so that a busy machine refuses no template; one that waits instead of working has twenty times as long.
"""

import datetime
import functools
import json
import re
import resource
import secrets
import signal
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple


def _serve() -> None:
    seconds, size = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    for ending in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(ending, signal.SIG_DFL)  # which ends the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, and it closes the input
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time, whatever else the machine does
        signal.alarm(20 * seconds)
        print(json.dumps(_answer(line)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def _answer(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        return _render(_compiled(request["source"], request["clock"]), request["arguments"])
    except ImportError:
        return {"error": "it needs an extra, install lmjax[hf]"}
    except Exception as error:  # whatever a template may do wrong
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


class _Compiled(NamedTuple):
    plain: Any
    marked: Any
    """The same template with marks around what it says to be generated; None where it says nothing of the kind."""
    marks: tuple[str, str]
    """What stands before and after it: nothing that a conversation could know."""


@functools.cache
def _compiled(source: str, clock: bool) -> _Compiled:
    secret = secrets.token_hex(16)
    marks = f"\0{secret}(", f"\0{secret})"
    plain, marked = _environment(None), _environment(marks)
    if not clock:
        del plain.globals["strftime_now"], marked.globals["strftime_now"]
    compiled = marked.from_string(source)
    return _Compiled(plain.from_string(source), compiled if marked.generations else None, marks)


def _render(template: _Compiled, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The text and the ranges of characters that the template marks, or None where it has no marks."""
    text = template.plain.render(arguments)
    if template.marked is None:
        return {"text": text, "marked": None}
    opening, closing = template.marks
    pieces, ranges, opened = [], [], []
    length = 0
    for piece in re.split(f"({re.escape(opening)}|{re.escape(closing)})", template.marked.render(arguments)):
        if piece == opening:
            opened.append(length)
        elif piece == closing:
            ranges.append((opened.pop(), length))
        else:
            pieces.append(piece)
            length += len(piece)
    if "".join(pieces) != text or opened:
        return {"error": "its marks {% generation %} change the text that it writes"}
    return {"text": text, "marked": [[start, end] for start, end in sorted(ranges) if end > start]}


def _environment(marks: tuple[str, str] | None) -> Any:
    """The settings, functions and filters that transformers gives its templates."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` encloses what the assistant writes; it leaves no trace in the text but `marks`."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            environment.generations = True
            if marks is not None:
                before, after = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in marks)
                body = [before, *body, after]
            return jinja2.nodes.Scope(body, lineno=line)

    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.generations = False
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "namespace": _namespace(),
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _namespace() -> Any:
    """Jinja's `namespace`, but for attributes that Python itself would look up: those are not for a template to set."""
    import jinja2.exceptions
    import jinja2.utils

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set the attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*values: Any, **named: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*values, **named).items():
            made[name] = value
        return made

    return namespace


if __name__ == "__main__":
    _serve()
