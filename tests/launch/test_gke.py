"""Manifests for Kubernetes: valid, complete, and the same as xpk's where it matters."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.engines import gke
from launch.job import Hardware
from lmjax.errors import ConfigError
from tests.launch.fake_tools import Tools
from tests.launch.rendered import CASES, GOLDEN, arguments, golden, jobs, render

CRD = Path(__file__).parents[3] / "shared" / "tools" / "jobset_crd.yaml.gz"
NAMES = ("gke-tpu", "gke-gpu")


def manifests(hardware: Hardware, *flags: str) -> list[dict[str, Any]]:
    """Of the three cells, the dearest first."""
    rendered = gke.render(
        "first", "gs://b/first", jobs("gs://b/first"), hardware, arguments(gke, ("--image=i", *flags))
    )
    return [yaml.safe_load(text) for name, text in rendered.items() if name.endswith(".yaml")]


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return job_of(manifest)["template"]["spec"]


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.mark.parametrize("name", NAMES)
def test_manifests_are_as_they_were(name: str) -> None:
    """After a wanted change: python -m tests.launch.rendered."""
    assert render(CASES[name]) == golden(name)


# Valid ------------------------------------------------------------------------------------------------------------

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "number": (int, float)}


def problems(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """What a server that refuses unknown fields would say."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str):
            yield f"{path}: neither a number nor a string"
        return
    expected = TYPES[schema["type"]]
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        yield f"{path}: {value!r} is not of type {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is not one of {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: {value!r} does not match {schema['pattern']}"
    if isinstance(value, int) and value < schema.get("minimum", value):
        yield f"{path}: {value} is less than {schema['minimum']}"
    if isinstance(value, str | list):
        unit = "Length" if isinstance(value, str) else "Items"
        if not schema.get(f"min{unit}", 0) <= len(value) <= schema.get(f"max{unit}", len(value)):
            yield f"{path}: too long or too short"
    if isinstance(value, list):
        for number, one in enumerate(value):
            yield from problems(one, schema["items"], f"{path}[{number}]")
    if isinstance(value, dict):
        yield from (f"{path}: lacks {name}" for name in schema.get("required", []) if name not in value)
        known = schema.get("properties", {})
        for name, one in value.items():
            if name in known:
                yield from problems(one, known[name], f"{path}.{name}")
            elif "additionalProperties" in schema:
                yield from problems(one, schema["additionalProperties"], f"{path}.{name}")
            elif known:
                yield f"{path}: unknown field {name}"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    if not CRD.exists():
        pytest.skip("the JobSet CRD is not here")
    (version,) = [one for one in yaml.safe_load(gzip.decompress(CRD.read_bytes()))["spec"]["versions"] if one["served"]]
    assert version["name"] == "v1alpha2"
    return version["schema"]["openAPIV3Schema"]


@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(),
        Hardware(nodes=3),
        Hardware("v5e-1", spot=True),
        Hardware("2xv5e-16", spot=True),
        Hardware("v4-8"),
        Hardware("v5p:4x4x8"),
        Hardware("v6e-256"),
        Hardware("tpu7x-128"),
        Hardware("L4-1"),
        Hardware("H100-16", nodes=2, spot=True),
    ],
)
def test_manifests_are_valid_jobsets(schema: dict[str, Any], hardware: Hardware) -> None:
    for manifest in manifests(hardware):
        assert not list(problems(manifest, schema))


def test_a_mistake_in_a_manifest_is_found(schema: dict[str, Any]) -> None:
    """By the check above."""
    manifest = manifests(Hardware("v5e-16"))[0]
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    job_of(manifest)["parallelism"] = "4"
    pod(manifest)["containers"][0]["volumeMounts"][0].pop("name")
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    found = "\n".join(problems(manifest, schema))
    assert found.count("\n") == 3
    for problem in ("unknown field maxRestart", "'4' is not of type integer", "lacks name", "'Fail' is not one of"):
        assert problem in found


# Hosts and chips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "slices", "hosts", "chips", "label", "shape"),
    [  # as xpk 1.16 has them: core/system_characteristics.py
        ("v5e-1", 1, 1, 1, "tpu-v5-lite-podslice", "1x1"),
        ("v5e-4", 1, 1, 4, "tpu-v5-lite-podslice", "2x2"),
        ("v5e-8", 1, 2, 4, "tpu-v5-lite-podslice", "2x4"),
        ("v5litepod-16", 1, 4, 4, "tpu-v5-lite-podslice", "4x4"),
        ("2xv5e-256", 2, 64, 4, "tpu-v5-lite-podslice", "16x16"),
        ("v6e-16", 1, 4, 4, "tpu-v6e-slice", "4x4"),
        ("v5p-8", 1, 1, 4, "tpu-v5p-slice", "2x2x1"),
        ("v5p-256", 1, 32, 4, "tpu-v5p-slice", "4x4x8"),
        ("v4-16", 1, 2, 4, "tpu-v4-podslice", "2x2x2"),
        ("tpu7x-128", 1, 16, 4, "tpu7x", "4x4x4"),
    ],
)
def test_a_slice_is_so_many_hosts(
    accelerator: str, slices: int, hosts: int, chips: int, label: str, shape: str
) -> None:
    manifest = manifests(Hardware(accelerator))[0]
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert job_of(manifest)["parallelism"] == job_of(manifest)["completions"] == hosts
    assert pod(manifest)["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    assert pod(manifest)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": shape,
    }


def test_hosts_without_a_tpu_are_told_their_places() -> None:
    """By the name of the first pod, under the JobSet's headless service."""
    for manifest in manifests(Hardware("H100-16", nodes=2)):
        name, values = manifest["metadata"]["name"], pod(manifest)["containers"][0]["env"]
        variables = {one["name"]: one.get("value") for one in values}
        assert variables["LMJAX_COORDINATOR"] == f"{name}-slice-0-0.{name}:8476"
        assert variables["LMJAX_PROCESSES"] == "2" and "LMJAX_PROCESS_ID" in variables
        assert pod(manifest)["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert "env" not in pod(manifests(Hardware("H100-8"))[0])["containers"][0]
    assert "env" not in pod(manifests(Hardware("2xv5e-16"))[0])["containers"][0]  # GKE tells them


@pytest.mark.parametrize("hardware", [Hardware(), Hardware("v5e-16"), Hardware("H100-8")])
def test_spot_machines_are_asked_for(hardware: Hardware) -> None:
    for spot in (False, True):
        (asked,) = {json.dumps(pod(one), sort_keys=True) for one in manifests(hardware._replace(spot=spot))[:1]}
        assert ("gke-spot" in asked) == spot


def test_cells_come_dearest_first_and_run_the_images_python() -> None:
    found = manifests(Hardware("v5e-16"))
    assert [one["metadata"]["name"] for one in found] == ["first-3", "first-7", "first-0"]
    command = pod(found[0])["containers"][0]["command"]
    assert command == ["python", "-m", "launch", "cell", "gs://b/first", "3"]
    assert pod(found[1])["containers"][0]["env"] == [{"name": "XLA_FLAGS", "value": "--a=1 --b=2"}]


# As xpk has it ----------------------------------------------------------------------------------------------------


def xpk_manifest(line: str, folder: Path) -> dict[str, Any]:
    """What xpk makes of its line; where it is not installed, what release 1.16.0 made of it."""
    if shutil.which("xpk") is None:
        recorded = (GOLDEN / "xpk-1.16.0.yaml").read_text()
        assert recorded.splitlines()[0] == f"# xpk 1.16.0: {line}"
        return yaml.safe_load(recorded)
    file = folder / "manifest.yaml"
    offline = ["--dry-run", "--skip-validation", "--project=p", "--zone=us-central1-a"]
    command = [*shlex.split(line), *offline, f"--output-manifest-file={file}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return yaml.safe_load(file.read_text())


CODES = {0, 1, 2, 3, 4, 5, 6, 75, 128 + 9, 128 + 15}


def restarted(job: dict[str, Any]) -> set[int]:
    """The codes of CODES after which all starts again, and not just fails."""
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    named = CODES & set(rule["onExitCodes"]["values"])
    return (named if rule["onExitCodes"]["operator"] == "NotIn" else CODES - named) - {0}


def test_xpk_would_make_the_same(tmp_path: Path) -> None:
    line = golden("gke-tpu")["xpk.sh"].splitlines()[0]
    ours, theirs = yaml.safe_load(golden("gke-tpu")["first-3.yaml"]), xpk_manifest(line, tmp_path)
    assert (ours["apiVersion"], ours["kind"]) == (theirs["apiVersion"], theirs["kind"])
    assert ours["metadata"]["name"] == theirs["metadata"]["name"]
    assert ours["metadata"]["annotations"] == theirs["metadata"]["annotations"]
    assert set(ours["metadata"]["labels"]) >= {"kueue.x-k8s.io/queue-name"} <= set(theirs["metadata"]["labels"])
    policies = [one["spec"]["failurePolicy"] for one in (ours, theirs)]
    assert policies[0]["maxRestarts"] == policies[1]["maxRestarts"] == 100
    assert [{**rule, "name": ""} for rule in policies[1]["rules"]] == [{**policies[0]["rules"][0], "name": ""}]
    assert ours["spec"]["replicatedJobs"][0]["replicas"] == theirs["spec"]["replicatedJobs"][0]["replicas"] == 2
    for key in ("parallelism", "completions", "backoffLimit"):
        assert job_of(ours)[key] == job_of(theirs)[key]
    assert restarted(job_of(ours)) == restarted(job_of(theirs)) == {6, 75, 137, 143}
    for key in ("restartPolicy", "hostNetwork", "dnsPolicy", "terminationGracePeriodSeconds"):
        assert pod(ours)[key] == pod(theirs)[key]
    spot = {"cloud.google.com/gke-spot": "true"}  # which xpk takes from the cluster, not from its line
    assert pod(ours)["nodeSelector"] == {**pod(theirs)["nodeSelector"], **spot}
    assert pod(theirs)["tolerations"][0] in pod(ours)["tolerations"]
    (our_container,), (their_container,) = pod(ours)["containers"], pod(theirs)["containers"]
    for key in ("image", "resources", "securityContext"):
        assert our_container[key] == their_container[key]
    assert shlex.join(our_container["command"]) in their_container["command"][-1]


# Submitted --------------------------------------------------------------------------------------------------------


def test_what_has_ended_is_replaced_and_what_runs_is_left_alone(
    tools: Tools, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {"first-0": "Failed", "first-3": "", "other-9": "Completed"}
    listed = [{"metadata": {"name": name}, "status": {"terminalState": state}} for name, state in states.items()]
    tools.say("kubectl", json.dumps({"items": listed}))
    case = CASES["gke-tpu"]
    flags = arguments(gke, case.flags)
    assert gke.submit("First!", case.directory, jobs(case.directory), case.hardware, flags) == 0
    assert tools.calls() == [
        "kubectl get jobsets --selector=lmjax-sweep=first --output=json",
        "kubectl delete jobset first-0",
        "kubectl apply --filename=-",
    ]
    gke.stop("first", case.directory, jobs(case.directory)[1:])
    assert tools.calls() == ["kubectl delete jobset --ignore-not-found --wait=false first-3 first-7"]


def test_all_manifests_are_applied_at_once(tmp_path: Path, tools: Tools) -> None:
    tools.say("kubectl", json.dumps({"items": []}))
    script = tools.folder / "kubectl"
    script.write_text(script.read_text().replace("cat ", f"[ $1 = apply ] && cat > {tmp_path}/applied\ncat "))
    case = CASES["gke-gpu"]
    gke.submit("first", case.directory, jobs(case.directory), case.hardware, arguments(gke, case.flags))
    applied = list(yaml.safe_load_all((tmp_path / "applied").read_text()))
    assert applied == [yaml.safe_load(golden("gke-gpu")[f"first-{cell}.yaml"]) for cell in (3, 7, 0)]


@pytest.mark.parametrize(
    ("directory", "hardware", "flags", "problem"),
    [
        ("gs://b/first", Hardware("v5e-16"), (), "needs --image"),
        ("sweeps/first", Hardware("v5e-16"), ("--image=i",), "name a bucket"),
        ("gs://b/first", Hardware("v5e-17"), ("--image=i",), "there is no such slice"),
        ("gs://b/first", Hardware("A10-8"), ("--image=i",), "GKE has L4, A100"),
    ],
)
def test_mistakes_are_named(directory: str, hardware: Hardware, flags: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        gke.render("first", directory, jobs(directory), hardware, arguments(gke, flags))
