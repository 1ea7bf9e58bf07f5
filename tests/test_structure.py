"""The house rules, read from the source: who may import whom, and what no module may do."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmjax.models.activations import ACTIVATIONS
from lmjax.models.attention.attention import BACKENDS
from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.models.moe.moe import DISPATCHES
from lmjax.models.remat import REMAT
from lmjax.optim.config import OptimizerConfig, ScheduleConfig
from lmjax.optim.rules import OPTIMIZERS
from lmjax.optim.schedules import SCHEDULES

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "lmjax").rglob("*.py"))
PROGRAMS = [
    path for folder in ("lmjax", "analysis", "configs", "launch") for path in sorted((ROOT / folder).rglob("*.py"))
]

# The rooms of the house: a module imports only from floors above its own and from its own room.
FLOORS: list[set[str]] = [
    {"errors"},
    {"schema", "weights", "metrics", "process"},
    {"record", "devices"},
    {"models", "optim", "data"},
    {"losses", "generate", "hf"},
    {"evaluate", "train"},
    {"config"},
    {"tasks"},
    {"run"},
    {"plan"},
    {"commands"},
    {"__main__"},
]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def part(module: str) -> str | None:
    """`lmjax.models.config` -> `models`; None for what is not ours."""
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "lmjax" and rest else None


def imports(path: Path) -> Iterator[str]:
    """The parts of lmjax that a module imports, in functions too."""
    for node in ast.walk(tree(path)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in map(part, names) if name)


def of_file(path: Path) -> str:
    relative = path.relative_to(ROOT / "lmjax")
    return relative.parts[0].removesuffix(".py")


FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def test_every_part_has_a_floor() -> None:
    assert {of_file(path) for path in MODULES} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_come_from_floors_above(path: Path) -> None:
    own = of_file(path)
    imported = set(imports(path)) - {own}
    wrong = {name for name in imported if FLOOR_OF[name] >= FLOOR_OF.get(own, -1)}
    assert not wrong, f"{own} may not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path: Path) -> None:
    """No pickle, no eval of data, no shell, no hidden defaults of configs."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            where = f"{path.name}:{node.lineno}: {called}"
            assert called not in {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load"}, where
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("allow_pickle", "False") == "False", where
            assert keywords.get("shell", "False") == "False", where
            assert keywords.get("trust_remote_code", "False") == "False", where
            config_get = isinstance(node.func, ast.Attribute) and node.func.attr == "get" and len(node.args) == 2
            if config_get and isinstance(node.func, ast.Attribute):
                holder = ast.unparse(node.func.value).split(".")[-1]
                assert "cfg" not in holder and "config" not in holder, f"{where}: a default belongs to the dataclass"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_for(path: Path) -> None:
    module = tree(path)
    assert not module.body or ast.get_docstring(module)
    for node in module.body:
        # A short function with a telling name and types needs no words; a class or a long function does.
        long = isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 25
        if isinstance(node, ast.FunctionDef) and long and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.lineno}: {node.name}"


@pytest.mark.parametrize(
    ("config", "field", "registry", "others"),
    [
        (ModelConfig, "activation", ACTIVATIONS, set()),
        (ModelConfig, "attention", BACKENDS, {"auto"}),
        (MoeConfig, "dispatch", DISPATCHES, set()),
        (ModelConfig, "remat", REMAT, set()),
        (OptimizerConfig, "name", OPTIMIZERS, set()),
        (ScheduleConfig, "name", SCHEDULES, set()),
    ],
)
def test_every_registered_thing_can_be_chosen(config: type, field: str, registry: dict, others: set[str]) -> None:
    for name in [*registry, *others]:
        assert getattr(config(**{field: name}), field) == name
    with pytest.raises(ValueError, match=next(iter(registry))):
        config(**{field: next(iter(registry)) + "x"})


def identifiers(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        for field in ("id", "arg", "attr", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name, getattr(node, "lineno", 0)


def shape_suffix(name: str) -> str:
    """The letters after the last underscore; none for a constant such as `MAX_T`."""
    match = re.search(r"[a-z0-9]_([A-Z0-9]*[A-Z][A-Z0-9]*)$", name)
    return match[1] if match else ""


@pytest.mark.parametrize(("name", "suffix"), [("x_BTD", "BTD"), ("order_B1T1", "B1T1"), ("MAX_T", ""), ("top_k", "")])
def test_a_shape_is_read_from_a_name(name: str, suffix: str) -> None:
    assert shape_suffix(name) == suffix


def test_every_letter_of_a_shape_is_in_the_legend() -> None:
    docstring = ast.get_docstring(tree(ROOT / "lmjax/models/model.py"), clean=False) or ""
    legend = re.findall(r"^    ([A-Z])  \S", docstring, re.M)
    assert len(legend) == len(set(legend)) > 10
    for path in MODULES:
        for name, line in identifiers(path):
            unknown = {*shape_suffix(name)} - {*legend, *"0123456789"}
            assert not unknown, f"{path.name}:{line}: the legend in model.py has no {', '.join(unknown)} of {name}"


def test_importing_the_library_starts_nothing() -> None:
    """Registries are literals: no module calls anything for its effect at its top level."""
    for path in MODULES:
        calls = [node for node in tree(path).body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
        assert not calls, f"{path.name}:{calls[0].lineno}: {ast.unparse(calls[0])}"
