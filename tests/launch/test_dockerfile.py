"""The Dockerfile as text: nothing here can build it."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "launch" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTRUCTIONS = [
    (line.split()[0], line.split(maxsplit=1)[1]) for line in TEXT.splitlines() if line and not line.startswith("#")
]
COPIED = [source for name, rest in INSTRUCTIONS if name == "COPY" for source in rest.split()[:-1]]


def values(name: str) -> list[str]:
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def test_every_instruction_is_one_that_is_looked_at_here() -> None:
    assert {name for name, _ in INSTRUCTIONS} == {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN"}  # no ENTRYPOINT
    assert len(values("FROM")) == len(values("ARG")) == len(values("WORKDIR")) == 1


def test_the_image_has_a_python_that_the_project_supports() -> None:
    """By its plain name, from nobody's own registry."""
    (image,) = values("FROM")
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", image)
    assert version and f"{version[1]}.0" in SpecifierSet(PROJECT["requires-python"])
    assert not re.search(r"https?:|--index-url|--extra-index-url", TEXT)


def test_what_is_copied_exists_and_reaches_docker() -> None:
    """Each to its own name, and all that a job runs."""
    allowed = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in allowed
    assert {line[1:] for line in allowed if line.startswith("!")} == set(COPIED)
    for source in COPIED:
        assert (ROOT / source).exists(), source
    assert {"lmjax", "configs", "launch", "analysis", PROJECT["readme"], *PROJECT["license-files"]} <= set(COPIED)
    for rest in values("COPY"):
        *sources, target = rest.split()
        assert target == "./" or [target] == sources


def test_commands_install_the_lock_and_then_the_checkout() -> None:
    lock, checkout = map(shlex.split, values("RUN"))
    assert lock[:2] == checkout[-4:-2] == ["pip", "install"]
    assert "--requirement=requirements.lock" in lock and "requirements.lock" in COPIED
    assert checkout[-1] == "--editable=.[${EXTRAS}]"
    order = [name for name, _ in INSTRUCTIONS]
    packages = order.index("COPY"), order.index("RUN")
    assert packages[0] < packages[1] < len(order) - 1 - order[::-1].index("COPY")  # the code comes after the packages


@pytest.mark.parametrize("chosen", [re.search(r"EXTRAS=(\S+)", TEXT)[1], *re.findall(r"^ARG EXTRAS=(\S+)", TEXT, re.M)])
def test_extras_are_those_of_the_project(chosen: str) -> None:
    assert set(chosen.split(",")) <= set(PROJECT["optional-dependencies"])
    for extra in re.findall(r"`(\w+)`", re.search(r"# EXTRAS are.*", TEXT)[0]):
        assert extra in PROJECT["optional-dependencies"]
