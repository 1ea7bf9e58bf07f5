"""The process that renders a chat template: `python -m lmjax.hf.template_process SECONDS BYTES`, see chat.py.

It imports nothing of ours, so that it starts at once and has nothing that a template could reach.
"""

import datetime
import json
import resource
import sys
from collections.abc import Mapping
from typing import Any


def _serve() -> None:
    seconds, size = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    request = json.load(sys.stdin.buffer)
    try:
        answer = {"text": _render(request["source"], request["arguments"])}
    except ImportError:
        answer = {"error": "it needs an extra, install lmjax[hf]"}
    except Exception as error:  # whatever a template may do wrong
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    print(json.dumps(answer))


def _render(source: str, arguments: Mapping[str, Any]) -> str:
    """Render with the settings, functions and filters that transformers gives its templates."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant wrote; it leaves no trace in the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    class Namespace(jinja2.utils.Namespace):
        """Attributes that Python itself would look up are not for a template to set."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set the attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*values: Any, **named: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*values, **named).items():
            made[name] = value
        return made

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "namespace": namespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    return environment.from_string(source).render(arguments)


if __name__ == "__main__":
    _serve()
