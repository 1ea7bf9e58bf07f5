"""The house rules, read from the source: who may import whom, and what no module may do."""

import ast
import fnmatch
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.data.mixture import MIXTURES
from lmjax.finetune.adapters import ADAPTERS
from lmjax.finetune.storage import STORAGES
from lmjax.models.activations import ACTIVATIONS
from lmjax.models.architectures import ARCHITECTURES
from lmjax.models.attention.attention import BACKENDS
from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.models.moe.moe import DISPATCHES
from lmjax.models.remat import REMAT
from lmjax.optim.config import OptimizerConfig, ScheduleConfig
from lmjax.optim.hyperparameters import RULES
from lmjax.optim.rules import OPTIMIZERS
from lmjax.optim.schedules import SCHEDULES
from lmjax.registry import TASKS
from lmjax.train.config import AdapterConfig, TuneConfig

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "lmjax").rglob("*.py"))
PROGRAMS = [
    path for folder in ("lmjax", "analysis", "configs", "launch") for path in sorted((ROOT / folder).rglob("*.py"))
]

# The rooms of the house: a module imports only from floors above its own and from its own room.
FLOORS: list[set[str]] = [
    {"errors"},
    {"schema", "names", "weights", "metrics", "process"},
    {"record", "devices", "parametrization"},
    {"models", "optim", "data"},
    {"losses", "generate", "hf"},
    {"evaluate", "train"},
    {"config"},
    {"tasks", "cells"},
    {"finetune"},
    {"registry"},
    {"run"},
    {"plan", "coordinates"},
    {"arguments", "command_data", "command_evaluate", "command_generate", "lm_eval"},
    {"commands"},
    {"__main__"},
]

# The order of inner rooms and of single modules: nothing in the first imports from the second, in functions neither.
ORDER: list[tuple[str, str]] = [
    ("lmjax.data.tokenizers", "lmjax.data.store"),
    ("lmjax.data.store", "lmjax.data.prepare"),
    ("lmjax.data.prepare", "lmjax.data.curate"),
    ("lmjax.data.prepare", "lmjax.data.loader"),
    ("lmjax.data.tokenizers.tokenizer", "lmjax.data.tokenizers.load"),
    ("lmjax.data.store.shards", "lmjax.data.store.staging"),
    ("lmjax.data.store.staging", "lmjax.data.store.dataset"),
    ("lmjax.models.attention", "lmjax.models.decoder"),
    ("lmjax.models.moe", "lmjax.models.decoder"),
    ("lmjax.models.attention", "lmjax.models.moe"),
    ("lmjax.record.files", "lmjax.record.seal"),
    ("lmjax.record.seal", "lmjax.record.checkpoint"),
    ("lmjax.evaluate.requests", "lmjax.evaluate.tasks"),
    ("lmjax.evaluate.texts", "lmjax.evaluate.tasks"),
    ("lmjax", "analysis"),
    ("lmjax", "launch"),
    ("analysis", "launch"),
]

# What a program runs without, and the modules to which that does not apply: benchmarks; the price of a sweep; and the
# two of lmjax that sweeps and configs share, plain Python.
SHARED = {"lmjax.models.shapes", "lmjax.optim.hyperparameters"}
FRAMEWORKS = {"torch", "keras", "transformers"}
WITHOUT: list[tuple[str, set[str], set[str]]] = [
    ("lmjax", FRAMEWORKS, set()),
    ("launch", FRAMEWORKS | {"jax", "flax", "optax"}, {"launch.price"}),
    ("analysis", FRAMEWORKS | {"jax", "flax", "optax", "lmjax", "analysis.bench"}, {"analysis.bench"} | SHARED),
]

TOP_LEVEL = {"lmjax", "configs", "launch", "tests", "analysis", "docs"}

MOST_LINES_OF_A_FUNCTION = 50
MOST_LINES_OF_A_FILE = 400


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


def test_the_readme_s_tree_is_the_house() -> None:
    """Each file and folder that it lists is there, on its floor; and it lists every folder of modules."""
    tree = (ROOT / "README.md").read_text().split("\n```\nlmjax/\n")[1].split("\n```\n")[0]
    tree = tree.replace("\n" + " " * 25, " ")  # lines that go on
    floor, folders, listed = 0, [ROOT / "lmjax"], {ROOT / "lmjax"}
    for line in tree.splitlines():
        depth, names = (len(line) - len(line.lstrip())) // 2, line[:25].split()
        floor = int(found[1]) if (found := re.search(r"\(floor (\d+)\)", line)) else floor
        folders = folders[:depth]
        paths = [Path(*folders[-1:] or [ROOT], name) for name in names]
        assert all(path.exists() for path in paths), line
        if folders == [ROOT / "lmjax"]:
            assert all(FLOOR_OF[of_file(path)] == floor for path in paths), line
        listed.update(paths)
        folders += [path for path in paths if path.is_dir()]
    rooms = {path.parent for path in PROGRAMS}
    assert not rooms - listed, f"README.md does not list {', '.join(map(str, sorted(rooms - listed)))}"


# Who imports whom, module by module ----------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


GRAPH_FILES = {module_name(path): path for path in PROGRAMS if path.relative_to(ROOT).parts[0] != "configs"}


def names_imported(path: Path) -> Iterator[str]:
    """What a module names in its imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in GRAPH_FILES else node.module for name in names)


IMPORTED = {name: set(names_imported(path)) for name, path in GRAPH_FILES.items()}


def find_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one cycle, the first also last, or none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for imported in sorted(graph[name] & graph.keys()):
            if found := search(imported, [*path, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (search(name, []) for name in graph)), [])


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_have_no_cycles() -> None:
    cycle = find_cycle(IMPORTED)
    assert not cycle, "imports go in a circle: " + " -> ".join(cycle)


def test_a_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"e", "b"}}) == ["b", "d", "b"]


@pytest.mark.parametrize(("inner", "outer"), ORDER)
def test_inner_rooms_do_not_import_outer_ones(inner: str, outer: str) -> None:
    for room in (inner, outer):
        assert any(within(name, room) for name in GRAPH_FILES), f"there is no {room}"
    wrong = [
        f"{name} imports {imported}"
        for name, names in IMPORTED.items()
        for imported in names
        if within(name, inner) and within(imported, outer)
    ]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize(("program", "packages", "apart_from"), WITHOUT)
def test_programs_run_without(program: str, packages: set[str], apart_from: set[str]) -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, names in IMPORTED.items()
        for imported in names
        if within(name, program) and any(within(imported, package) for package in packages)
        if not any(within(one, other) for one in (name, imported) for other in apart_from)
    ]
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("module", sorted(SHARED))
def test_what_sweeps_and_configs_share_is_plain_python(module: str) -> None:
    packages = {name.split(".")[0] for name in IMPORTED[module] if name != "lmjax.errors"}
    assert packages <= sys.stdlib_module_names


# How large things are -------------------------------------------------------------------------------------------------


def test_the_top_level_is_known() -> None:
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    unknown = {name for name in folders - TOP_LEVEL if not any(fnmatch.fnmatch(name, one) for one in ignored)}
    assert not unknown and folders >= TOP_LEVEL


def test_functions_fit_on_a_screen() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in GRAPH_FILES.values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    }
    assert not long


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in GRAPH_FILES.values()}
    assert not {name for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FILE}


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
        (ModelConfig, "architecture", ARCHITECTURES, set()),
        (DataConfig, "mixture", MIXTURES, set()),
        (Config, "task", TASKS, set()),
        (AdapterConfig, "name", ADAPTERS, set()),
        (TuneConfig, "store", STORAGES, set()),
        (Config, "hyperparameters", RULES, set()),
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
