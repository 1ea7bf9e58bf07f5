"""Tasks for SkyPilot."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.engines import skypilot
from launch.job import Hardware
from lmjax.errors import ConfigError
from tests.launch.fake_tools import Tools
from tests.launch.rendered import CASES, GOLDEN, arguments, golden, jobs, render

NAMES = ("skypilot-tpu", "skypilot-gpu")


def tasks(hardware: Hardware, directory: str = "gs://b/first") -> list[dict[str, Any]]:
    """Of the three cells, the dearest first."""
    rendered = skypilot.render("first", directory, jobs(directory), hardware, arguments(skypilot))
    return [yaml.safe_load(text) for text in rendered.values()]


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_as_they_were(name: str) -> None:
    """After a wanted change: python -m tests.launch.rendered."""
    assert render(CASES[name]) == golden(name)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("skypilot-*/*.yaml")), ids=lambda path: f"{path.parent.name}")
def test_skypilot_accepts_them(path: Path) -> None:
    """It did with release 0.14.1."""
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(path))
    assert task.name == path.stem
    (resources,) = task.resources
    hosts, accelerators = (1, {"tpu-v5litepod-16": 1}) if "tpu" in path.parent.name else (2, {"H100": 8})
    assert (task.num_nodes, resources.accelerators) == (hosts, accelerators)
    assert resources.use_spot == ("tpu" in path.parent.name)


@pytest.mark.parametrize(
    ("hardware", "nodes", "accelerators"),
    [
        (Hardware(), 1, None),
        (Hardware(nodes=2), 2, None),
        (Hardware("v5e-8"), 1, "tpu-v5litepod-8"),
        (Hardware("v5p-256"), 1, "tpu-v5p-256"),  # TensorCores, as Google counts them
        (Hardware("v5p:4x4x8"), 1, "tpu-v5p-256"),
        (Hardware("v5p:4x8x12"), 1, "tpu-v5p-768"),
        (Hardware("v6e-16"), 1, "tpu-v6e-16"),
        (Hardware("v4-8"), 1, "tpu-v4-8"),
        (Hardware("H100-8"), 1, "H100:8"),
        (Hardware("H100-16", nodes=2), 2, "H100:8"),
    ],
)
def test_what_a_job_runs_on(hardware: Hardware, nodes: int, accelerators: str | None) -> None:
    for spot in (False, True):
        task = tasks(hardware._replace(spot=spot))[0]
        assert (task["num_nodes"], task["resources"].get("accelerators")) == (nodes, accelerators)
        assert task["resources"]["use_spot"] == spot


@pytest.mark.parametrize(
    ("hardware", "recovery"),
    [
        (Hardware("H100-8"), {"max_restarts_on_errors": 0, "recover_on_exit_codes": [6, 75]}),
        (Hardware("v5e-4"), {"max_restarts_on_errors": 0, "recover_on_exit_codes": [6, 75]}),
        (Hardware("H100-16", nodes=2), {"max_restarts_on_errors": 10, "recover_on_exit_codes": [75]}),
        (Hardware("v5e-16"), {"max_restarts_on_errors": 10, "recover_on_exit_codes": [75]}),
    ],
)
def test_no_bug_is_started_again_without_end(hardware: Hardware, recovery: dict[str, Any]) -> None:
    """A host ends with 6 when another has a bug, and SkyPilot recovers for the code of any host."""
    assert tasks(hardware)[0]["resources"]["job_recovery"] == recovery


@pytest.mark.parametrize(("accelerator", "extras"), [(None, "[gcp]"), ("v5e-4", "[tpu,gcp]"), ("H100-8", "[cuda,gcp]")])
def test_a_job_installs_the_checkout_and_runs_its_cell(accelerator: str | None, extras: str) -> None:
    found = tasks(Hardware(accelerator), "gs://b/d")
    assert [task["name"] for task in found] == ["first-3", "first-7", "first-0"]  # the dearest first
    assert found[1]["envs"] == {"XLA_FLAGS": "--a=1 --b=2"} and "envs" not in found[0]
    assert found[0]["workdir"] == "." and f"'.{extras}'" in found[0]["setup"]
    assert found[0]["run"] == "$HOME/lmjax/bin/python -m launch cell gs://b/d 3"


def test_what_is_in_the_queue_is_not_launched_again(tools: Tools) -> None:
    case = CASES["skypilot-gpu"]
    tools.say("sky", json.dumps([{"job_id": 4, "job_name": "first-3"}, {"job_id": 5, "job_name": "other-0"}]))
    flags = arguments(skypilot, case.flags)
    assert skypilot.submit("first", case.directory, jobs(case.directory), case.hardware, flags) == 0
    queue, *launched = tools.calls()
    assert queue == "sky jobs queue --skip-finished --all --output=json"
    assert [call.rpartition("/")[2] for call in launched] == ["first-7.yaml", "first-0.yaml"]
    assert all(call.startswith("sky jobs launch --detach-run --yes /") for call in launched)
    skypilot.stop("first", case.directory, jobs(case.directory))
    assert tools.calls()[1:] == ["sky jobs cancel --yes 4"]


@pytest.mark.parametrize(
    ("directory", "hardware", "problem"),
    [
        ("sweeps/first", Hardware(), "name a bucket"),
        ("gs://b/d", Hardware("2xv5e-16"), "single slices"),
        ("gs://b/d", Hardware("v5p:4x4x24"), "use v5p-768, or --engine=gke"),
        ("gs://b/d", Hardware("tpu7x-128"), "has the TPUs v4, v5e"),
    ],
)
def test_mistakes_are_named(directory: str, hardware: Hardware, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tasks(hardware, directory)
