"""Writes docs/config.md from the config classes:  python docs/config_page.py > docs/config.md"""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from lmjax.config import Config
from lmjax.data.config import ChatConfig, PrepareConfig, SourceConfig
from lmjax.data.curate.recipe import STEPS, CurateConfig
from lmjax.train.config import AdapterConfig, DistillConfig, EvaluationsConfig

INTRODUCTION = """# Every setting

`--config.model.layers=8` sets one; a config file sets them as `config.model.layers = 8`. Types, ranges and choices are
checked before anything runs, and a misspelt key is refused with the nearest one that exists. This page is written from
the config classes by `python docs/config_page.py > docs/config.md`.

`config.data.sources` is a dictionary by name of sources, listed at the end with the recipe that a source may carry, and
`train.evaluations` and `tune.adapter`, which are off until one of their settings is given.
"""


# What a step has no default for.
NEEDED: dict[str, dict[str, Any]] = {
    "quality": {"good": ("FILES",), "bad": ("FILES",)},
    "toxicity": {"labelled": ("FILES",)},
    "decontaminate": {"sets": {"NAME": "FILE"}},
}


def rows(config: Any, prefix: str) -> Iterator[str]:
    """One table row per setting of a config object, groups of settings after the plain ones."""
    cls, groups = type(config), {}
    texts = docstrings(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(config):
        name, default = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(default):
            groups[f"{name}."] = default
            continue
        described = " ".join(texts.get(field.name, "").split()).replace("|", "\\|")
        described = re.sub(r"(`[^`]*`)|\*", lambda found: found[1] or r"\*", described)  # a star is no emphasis
        listed = ", ".join(f"`{choice}`" for choice in choices(hints[field.name]))
        yield f"| `{name}` | `{default!r}` | {' '.join(filter(None, [listed and f'{listed}.', described]))} |"
    for group, value in groups.items():
        yield from rows(value, group)


def docstrings(cls: type) -> dict[str, str]:
    """What stands under each field of a class, and of those that it inherits from. Pydantic could keep it, but every
    command would read the sources for it."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        [node] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in itertools.pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return found


def choices(hint: Any) -> Sequence[str]:
    """The names that a setting may have, if it is a choice."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    validators = getattr(hint, "__metadata__", ())
    return next((v.func.choices for v in validators if hasattr(getattr(v, "func", None), "choices")), ())


def page() -> str:
    tables = [
        ("The run", Config(), ""),
        ("An adapter", AdapterConfig(), "tune.adapter."),
        ("A teacher", DistillConfig(), "train.distill."),
        ("A data source", SourceConfig(path="DIRECTORY"), ""),
        ("A recipe", PrepareConfig(), "prepare."),
        ("A recipe for conversations", ChatConfig(), "prepare.chat."),
        ("Benchmarks during training", EvaluationsConfig(), "train.evaluations."),
    ]
    tables += [("A curation", CurateConfig(sources={"NAME": ("FILES",)}, steps=()), "")]
    tables += [(f"The step `{name}`", step(**NEEDED.get(name, {})), "") for name, step in STEPS.items()]
    parts = [INTRODUCTION]
    for title, config, prefix in tables:
        parts += [f"## {title}\n", "| setting | default | |", "| --- | --- | --- |", *rows(config, prefix), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
