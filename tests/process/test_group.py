"""Who a process is, from its environment; and two real processes that agree, vote and share batches and checkpoints."""

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmjax.errors import ConfigError, StallError
from lmjax.process import cluster, group
from lmjax.process.cluster import Cluster, detect, listening_address, tpu_metadata
from lmjax.record import inspect, steps
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.config import CheckpointConfig

ROOT = Path(__file__).parents[2]

# Who am I? ------------------------------------------------------------------------------------------------------------

FLAGS = {"LMJAX_COORDINATOR": "10.0.0.1:1234", "LMJAX_PROCESSES": "4", "LMJAX_PROCESS_ID": "3"}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "s-0:8080", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-015,020],big1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "1(x16)",
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "0",
}
SHARED_NODE = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}
LOCALHOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (FLAGS, ("10.0.0.1:1234", 4, 3, None)),
        (FLAGS | TPU | SLURM, ("10.0.0.1:1234", 4, 3, None)),
        ({"LMJAX_PROCESSES": "1"} | SLURM | TPU, ("localhost:0", 1, 0, None)),
        (TPU, ("t-0.svc:8482", 2, 1, None)),
        (TPU | SLICES, ("s-0:8482", 6, 5, None)),
        (TPU | {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}, ("t-0.svc:8482", 2, 1, None)),
        (TPU | {"TPU_PROCESS_ADDRESSES": "h0:8471,h1:8471,h2:8471"}, ("h0:8482", 3, 1, None)),
        (LOCALHOST, None),
        (LOCALHOST | SKYPILOT, ("10.0.0.5:8476", 2, 1, None)),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, None),
        (SLURM, ("gpu003:62346", 16, 7, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "n0"}, ("n0:62346", 16, 7, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "n0,n[4-5]"}, ("n0:62346", 16, 7, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "rack2-[07-08]-x"}, ("rack2-07-x:62346", 16, 7, None)),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, None),  # a batch script, or ssh into a node
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SHARED_NODE, ("gpu003:62346", 16, 7, (5,))),
        (SHARED_NODE | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ("gpu003:62346", 16, 7, (5,))),
        (SHARED_NODE | {"CUDA_VISIBLE_DEVICES": "5"}, ("gpu003:62346", 16, 7, None)),  # --gpus-per-task has bound it
    ],
)
def test_a_process_knows_its_place(environment: dict[str, str], expected: tuple[Any, ...] | None) -> None:
    found = detect(environment)
    assert expected == (found and (found.coordinator, found.processes, found.process, found.local_devices))


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"LMJAX_PROCESSES": "4"}, "LMJAX_PROCESSES set, but LMJAX_COORDINATOR, LMJAX_PROCESS_ID not; give --coord"),
        (FLAGS | {"LMJAX_PROCESS_ID": "4"}, "process 4 of 4 processes .*one less than there are"),
        (FLAGS | {"LMJAX_PROCESS_ID": "-1"}, "LMJAX_PROCESS_ID='-1' is not a number"),
        (FLAGS | {"LMJAX_COORDINATOR": "somewhere"}, "'somewhere' .flags. is not host:port"),
        (FLAGS | {"LMJAX_PROCESSES": "0", "LMJAX_PROCESS_ID": "0"}, "process 0 of 0 processes"),
        (FLAGS | {"LMJAX_COORDINATOR": "somewhere:99999"}, "'somewhere:99999' .flags. is not host:port"),
        ({"TPU_WORKER_ID": "0"}, "TPU_WORKER_ID set, but TPU_WORKER_HOSTNAMES not"),
        (TPU | {"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_SLICE_ID not"),
        ({"SKYPILOT_NODE_RANK": "0"}, "SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES not"),
        (SLURM | {"SLURM_PROCID": ""}, "SLURM_PROCID not; start the command with srun"),
        (SLURM | {"SLURM_STEP_NODELIST": "[1]"}, "names no node"),
    ],
)
def test_half_an_environment_is_refused(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        detect(environment)


@pytest.mark.parametrize(
    ("coordinator", "listen", "expected"),
    [
        ("n0.cluster:1234", "", "::"),
        ("10.0.0.1:1234", "", "::"),
        ("localhost:1234", "", "127.0.0.1"),  # nobody else could reach it
        ("[::1]:1234", "", "::1"),
        ("n0.cluster:1234", "10.0.0.7", "10.0.0.7"),
        ("localhost:1234", "0.0.0.0", "0.0.0.0"),
        ("n0.cluster:1234", "n0.cluster", None),
    ],
)
def test_process_0_listens_where_it_is_told(coordinator: str, listen: str, expected: str | None) -> None:
    environment = FLAGS | {"LMJAX_COORDINATOR": coordinator, "LMJAX_LISTEN": listen}
    cluster = detect(environment)
    assert cluster is not None
    if expected is None:
        with pytest.raises(ConfigError, match=r"LMJAX_LISTEN='n0\.cluster' is not an IP address of this machine"):
            listening_address(environment, cluster)
    else:
        assert listening_address(environment, cluster) == expected


@pytest.fixture
def metadata_server() -> Iterator[str]:
    """Google's metadata server as a TPU VM sees it: a multislice of hosts, in the older form `name:id:address`."""
    attributes = {
        "worker-network-endpoints": "w0:1:10.0.0.2,w1:2:10.0.0.3",
        "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v4-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
        "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(attributes[self.path.rsplit("/", 1)[1]].encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_port}"
        server.shutdown()


def test_a_tpu_vm_asks_the_metadata_server(metadata_server: str, monkeypatch: Any) -> None:
    address = {"GCE_METADATA_IP": metadata_server}
    assert tpu_metadata(address) == {} or cluster._has_tpu()
    monkeypatch.setattr(cluster, "_has_tpu", lambda: True)
    expected = Cluster("10.0.0.1:8482", 4, 3, "TPU environment")
    assert detect(tpu_metadata(address)) == expected
    assert tpu_metadata(address | TPU) == tpu_metadata(address | FLAGS) == {}  # known already
    assert tpu_metadata({"GCE_METADATA_IP": "localhost:1"}) == {}  # not at Google


GLOO = "UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:29102: Connection reset by peer"
FULL = (
    "RESOURCE_EXHAUSTED: Error writing local file \"/runs/connection/d\": No space left on device [os_error_code='28']"
)
BUCKET = "ABORTED: Error reading gs://b/zarr.json: All 1 retry attempts failed: Could not connect [curl_code='7']"


@pytest.mark.parametrize(
    ("raised", "lost"),
    [
        (RuntimeError("UNAVAILABLE: Socket closed"), True),
        (ValueError(GLOO), True),  # what reads an array whose program failed
        (ValueError("the connection of the residuals is unknown"), False),
        (ValueError(FULL), False),  # TensorStore's
        (ValueError(BUCKET), False),
        (ConfigError("MESH: no connection"), False),
        (RuntimeError("INTERNAL: out of registers"), False),
    ],
)
def test_what_jax_raises_when_a_process_is_gone_is_no_bug(raised: Exception, lost: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(group, "_started", Cluster("localhost:1", 2, 0, "flags"))
    with pytest.raises(StallError if lost else type(raised)) as found, group.naming_lost_peers("training"):
        raise raised
    assert (found.value is raised) == (not lost)  # all of lmjax's errors are ValueErrors, too


# Together -------------------------------------------------------------------------------------------------------------

LOCAL = [sys.executable, "-m", "launch", "local", "--processes=2", "--devices-per-process=2", "--"]
SLURM_STEP = ["srun", "--nodes=2", "--ntasks=2", "env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"]
SLURM = shutil.which("sinfo") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0
NEEDS_SLURM = [pytest.mark.slow, pytest.mark.skipif(not SLURM, reason="needs a Slurm of two nodes that is up")]


def start(launcher: list[str], *arguments: str) -> list[dict[str, Any]]:
    """What each of several processes that run multi_process.py says at its end."""
    command = [*launcher, sys.executable, "tests/process/multi_process.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line[line.index("{") :] for line in done.stderr.splitlines() if '{"process"' in line]
    return sorted(map(json.loads, said), key=lambda report: report["process"])


@pytest.mark.parametrize("launcher", [LOCAL, pytest.param(SLURM_STEP, marks=NEEDS_SLURM)], ids=["local", "slurm"])
def test_two_processes_agree_vote_place_batches_and_share_checkpoints(launcher: list[str], tmp_path: Path) -> None:
    import jax

    state = {"w": jax.numpy.arange(64, dtype="float32").reshape(8, 8), "step": jax.numpy.int32(7)}
    alone = Checkpoints(tmp_path / "alone", CheckpointConfig())
    alone.save(3, state, {"data": "x"})
    alone.wait()
    reports = start(launcher, str(tmp_path))
    for report in reports:
        assert report["shared"] == {"from": 0}
        assert report["gathered"] == ([[0, "zero"], [1, "one"]] if report["process"] == 0 else [])
        assert report["votes"] == [False, False, False, True, False]  # process 1 raised its hand at the third call
        assert report["votes_within"] == [False, True, False]
        left_out = [re.match("the mesh takes ([12]) of 4 devices in 2 processes: ", line) for line in report["refused"]]
        assert [match and match[1] for match in left_out] == ["1", "2"]
        assert report["batches"] == "whole"
        assert report["restored"] == [3, {"data": "x"}]
    assert [report["rows"] for report in reports] == [
        {"data=4": [0, 1, 2, 3], "tensor=4": [0, 1, 2, 3, 4, 5, 6, 7]},
        {"data=4": [4, 5, 6, 7], "tensor=4": [0, 1, 2, 3, 4, 5, 6, 7]},
    ]
    together = inspect.inspect(tmp_path / "together", hashes=True)
    assert together["hashes"] == inspect.inspect(tmp_path / "alone", hashes=True)["hashes"]
    assert steps.verify(tmp_path / "together") == []
    manifest = json.loads((tmp_path / "together" / "4" / "LMJAX_MANIFEST.json").read_text())
    assert {name.split("/")[1] for name in manifest["files"] if "ocdbt.process" in name} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
