"""Several processes as one run: who they are, how they find each other, agree, and wait for each other.

    cluster = detect(os.environ)      from flags, TPU, SkyPilot or Slurm; None on a single process
    start(os.environ, ...)            connects them; before the first use of a device
    share, gather, barrier            small JSON values by way of the coordinator: no devices, any thread, bounded time
    Vote                              one bit on the devices, in the order of the steps

Process 0 leads: it alone writes logs, metrics, the ledger and the seals of checkpoints. On one process all of this
returns at once and imports nothing.
"""

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from lmjax.errors import ConfigError, StallError
from lmjax.lifeline import Lifeline

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30  # a process that is silent for so long counts as lost
ANSWER_SECONDS = 1200.0  # how long one process waits for another to write, hash or read its share of a checkpoint
PATIENCE_SECONDS = 86_400.0  # how long all wait for process 0 to prepare data, or to write the report
_TPU_PORT = 8482  # JAX's own choice
_SKYPILOT_PORT = 8476


class Cluster(NamedTuple):
    """One process's place in a run."""

    coordinator: str
    """host:port where process 0 listens."""
    processes: int
    process: int
    source: str
    """Where this is known from."""
    local_devices: tuple[int, ...] | None = None
    """The GPUs of this process, where several processes share a machine that shows all of its GPUs to each."""


# Who am I? --------------------------------------------------------------------------------------------------------


def detect(environment: Mapping[str, str]) -> Cluster | None:
    """This process's place, or None if it is alone. The first of these that names several processes counts:

    1. LMJAX_COORDINATOR, LMJAX_PROCESSES, LMJAX_PROCESS_ID: what the flags and `python -m launch` set. LMJAX_PROCESSES
       = 1 alone makes a process single wherever it runs.
    2. TPU: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID; with several slices MEGASCALE_COORDINATOR_ADDRESS, _NUM_SLICES,
       _SLICE_ID. GKE sets them; on TPU VMs `start` reads them from the metadata server.
    3. SkyPilot: SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK.
    4. Slurm, inside `srun`: SLURM_STEP_NODELIST, SLURM_STEP_NUM_TASKS, SLURM_PROCID, ...

    Raises ConfigError when some variables of a source are there and others are missing or make no sense.
    """
    if (cluster := _from_flags(environment)) is not None:
        return _checked(cluster)
    for source in (_from_tpu, _from_skypilot, _from_slurm):
        cluster = source(environment)
        if cluster is not None and cluster.processes > 1:
            return _checked(cluster)
    return None


def _from_flags(environment: Mapping[str, str]) -> Cluster | None:
    names = ("LMJAX_COORDINATOR", "LMJAX_PROCESSES", "LMJAX_PROCESS_ID")
    if [environment.get(name, "") for name in names] == ["", "1", ""]:
        return Cluster("localhost:0", 1, 0, "LMJAX_PROCESSES=1")
    values = _complete(environment, names, "give --coordinator=host:port --processes=N --process-id=I together")
    if values is None:
        return None
    coordinator, processes, process = values
    return Cluster(coordinator, _number(names[1], processes), _number(names[2], process), "flags")


def _from_tpu(environment: Mapping[str, str]) -> Cluster | None:
    hosts_name = "TPU_PROCESS_ADDRESSES" if environment.get("TPU_PROCESS_ADDRESSES") else "TPU_WORKER_HOSTNAMES"
    values = _complete(environment, (hosts_name, "TPU_WORKER_ID"), "set both, as GKE does, or none")
    if values is None:
        return None
    hosts, worker = values[0].split(","), _number("TPU_WORKER_ID", values[1])
    names = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    several = environment.get("MEGASCALE_NUM_SLICES") != "1"
    slices_known = _complete(environment, names, "set all three, as GKE does, or none") if several else None
    address, slices, slice_id = slices_known or (hosts[0], "1", "0")
    process = worker + len(hosts) * _number(names[2], slice_id)
    host = address.split(":")[0]
    return Cluster(f"{host}:{_TPU_PORT}", len(hosts) * _number(names[1], slices), process, "TPU environment")


def _from_skypilot(environment: Mapping[str, str]) -> Cluster | None:
    names = ("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK")
    values = _complete(environment, names, "SkyPilot sets all three")
    if values is None:
        return None
    address = f"{values[0].split()[0]}:{_SKYPILOT_PORT}"
    return Cluster(address, _number(names[1], values[1]), _number(names[2], values[2]), "SkyPilot")


def _from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    if not environment.get("SLURM_STEP_NODELIST"):  # not started by srun: a batch script, an allocation's shell, ssh
        return None
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    values = _complete(environment, names, "start the command with srun") or []
    job, step, nodes, tasks, process = values
    # Two steps of a job may run side by side. The range is the one that JAX uses, the upper end of the free ports.
    port = 61440 + (_number(names[0], job) + _number(names[1], step)) % 4096
    address = f"{_first_host(nodes)}:{port}"
    local_devices = _slurm_devices(environment)
    return Cluster(address, _number(names[3], tasks), _number(names[4], process), "Slurm", local_devices)


def _first_host(nodes: str) -> str:
    """`n[003-015,20],m1` -> `n003`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} names no node; start the command with srun")
    prefix, number, suffix = match.groups("")
    return prefix + number + suffix


def _slurm_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """A GPU of its own for each of several tasks on a node, unless Slurm shows each task its own GPUs alone."""
    tasks_per_node = re.findall(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    shown = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    if tasks_per_node[0] == "1" or (shown and "," not in shown):
        return None
    return (_number("SLURM_LOCALID", environment.get("SLURM_LOCALID", "")),)


def _complete(environment: Mapping[str, str], names: Sequence[str], what_to_do: str) -> list[str] | None:
    """The values of all these variables, None if none is set. Raises ConfigError if only some are."""
    given = [name for name in names if environment.get(name)]
    if not given:
        return None
    if missing := [name for name in names if name not in given]:
        raise ConfigError(f"{', '.join(given)} set, but {', '.join(missing)} not; {what_to_do}")
    return [environment[name] for name in names]


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} is not a number")
    return int(text)


def _checked(cluster: Cluster) -> Cluster:
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) < 2**16:
        raise ConfigError(f"coordinator {cluster.coordinator!r} ({cluster.source}) is not host:port")
    if not 0 <= cluster.process < cluster.processes:
        raise ConfigError(
            f"process {cluster.process} of {cluster.processes} processes ({cluster.source}): their numbers are 0 to "
            "one less than there are"
        )
    return cluster


def tpu_metadata(environment: Mapping[str, str]) -> dict[str, str]:
    """On a TPU VM what GKE would have put into the environment, from Google's metadata server; elsewhere nothing."""
    known = any(environment.get(name) for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "LMJAX_PROCESSES"))
    if known or environment.get("TPU_SKIP_MDS_QUERY") or not _has_tpu():
        return {}
    address = environment.get("GCE_METADATA_IP", "metadata.google.internal")

    def attribute(name: str) -> str:
        url = f"http://{address}/computeMetadata/v1/instance/attributes/{name}"
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5
        ) as reply:
            return reply.read().decode()

    try:
        workers, number, lines = map(attribute, ("worker-network-endpoints", "agent-worker-number", "tpu-env"))
    except (urllib.error.URLError, OSError):
        return {}
    pairs = (line.partition(":")[::2] for line in lines.splitlines())
    slices = {name.strip(): value.strip().strip("'") for name, value in pairs if name.strip().startswith("MEGASCALE_")}
    # A worker is `host`, or `name:id:address` in the older form.
    return slices | {
        "TPU_WORKER_HOSTNAMES": ",".join(worker.split(":")[-1] for worker in workers.split(",")),
        "TPU_WORKER_ID": number.strip(),
    }


def _has_tpu() -> bool:
    return any(os.path.exists(device) for device in ("/dev/accel0", "/dev/vfio/0"))


# Start-up ---------------------------------------------------------------------------------------------------------

_started: Cluster | None = None
_lifeline: Lifeline | None = None


def start(environment: Mapping[str, str], *, timeout: float, on_loss: Callable[[str], NoReturn]) -> None:
    """Connect this process with the others, if there are any; call it before anything touches a device.

    Says on stderr where it connects to. From here on only process 0 has a stdout, and `on_loss` is called, on a thread
    of its own, with a message when another process has died. Raises ConfigError for a half-set environment, StallError
    when the coordinator or a process is not there within `timeout` seconds.
    """
    global _started, _lifeline
    if not timeout > 0:
        raise ConfigError(f"--start-timeout={timeout:g} is not a positive number of seconds")
    cluster = detect(tpu_metadata(environment) | dict(environment))
    if cluster is None or cluster.processes == 1:
        _warn_outside_srun(environment)
        return
    _started = cluster
    logging.basicConfig(format=f"lmjax: {name()}%(message)s")
    say(f"coordinator {cluster.coordinator} (from {cluster.source})")
    begin = time.monotonic()
    _lifeline = Lifeline(cluster.coordinator, cluster.process, cluster.processes, timeout)
    _lifeline.watch(on_loss, say)
    _connect(cluster, timeout)

    import jax

    seconds = time.monotonic() - begin
    say(f"connected in {seconds:.1f} s; {jax.local_device_count()} of {jax.device_count()} devices are here")
    if not leads():
        sys.stdout.flush()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what people read is said once


def finish() -> None:
    """Wait until all processes are done; the last thing that a process does when all went well.

    SIGTERM can ask for nothing more: schedulers send it as soon as the first process ends with any code but 0.
    """
    if _lifeline is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        barrier("the end", PATIENCE_SECONDS)
        _lifeline.close()


def _warn_outside_srun(environment: Mapping[str, str]) -> None:
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1" and not environment.get("SLURM_STEP_NODELIST"):
        logger.warning("this Slurm job has %s tasks, but this process was not started by srun: it runs alone", tasks)


def _connect(cluster: Cluster, timeout: float) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from runtime.Preemption
    # Where JAX notices a loss before we do it calls abort(). The signal's number, 6, is our exit code, so that the
    # handler that turns the one into the other is the C library's own _exit: it needs no lock, and no interpreter.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc._exit)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(timeout)),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


def process() -> int:
    return 0 if _started is None else _started.process


def processes() -> int:
    return 1 if _started is None else _started.processes


def leads() -> bool:
    """Whether this is process 0, which writes what the run leaves behind."""
    return process() == 0


def name() -> str:
    """`process 2 of 4: `, for messages; empty on a single process."""
    return "" if _started is None else f"process {_started.process} of {_started.processes}: "


def say(text: str) -> None:
    print(f"lmjax: {name()}{text}", file=sys.stderr, flush=True)


# Agreeing ---------------------------------------------------------------------------------------------------------


def gather(what: str, value: Any, seconds: float = ANSWER_SECONDS) -> list[Any]:
    """At process 0 the JSON values of all processes in their order, elsewhere nothing.

    Every process calls this, `share` and `barrier` in the same order for the same `what`. Raises StallError when a
    process does not answer within `seconds`.
    """
    if _started is None:
        return [value]
    key = _next_key(what)
    if not leads():
        _client().key_value_set(f"{key}/{process()}", json.dumps(value))
        return []
    end, values = time.monotonic() + seconds, [value]
    for other in range(1, processes()):
        values.append(json.loads(_wait_for(f"{key}/{other}", what, other, end - time.monotonic())))
    _client().key_value_delete(key)
    return values


def share(what: str, value: Any, seconds: float = ANSWER_SECONDS) -> Any:
    """The JSON value of process 0, at every process; what the others pass does not matter."""
    if _started is None:
        return value
    key = _next_key(what)
    if leads():
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_wait_for(key, what, 0, seconds))


def barrier(what: str, seconds: float = ANSWER_SECONDS) -> None:
    """Wait until every process is here."""
    if _started is None:
        return
    with naming_lost_peers(f"waiting for all processes: {what}"):
        _client().wait_at_barrier(_next_key(what), round(1000 * seconds))


@contextlib.contextmanager
def leader_first(what: str, seconds: float) -> Iterator[None]:
    """Process 0 does the body before the others do, and they find it done."""
    if not leads():
        barrier(what, seconds)
    yield
    if leads():
        barrier(what, seconds)


def _wait_for(key: str, what: str, other: int, seconds: float) -> str:
    with naming_lost_peers(f"{what}: process {other} did not answer"):
        return _client().blocking_key_value_get(key, max(1, round(1000 * seconds)))


_uses: dict[str, int] = {}


def _next_key(what: str) -> str:
    _uses[what] = _uses.get(what, 0) + 1
    return f"lmjax/{what}/{_uses[what]}"


def _client() -> Any:
    """JAX's connection to the coordinator. It has no public name; Orbax uses it under this one, too."""
    from jax._src import distributed

    return distributed.global_state.client


class Vote:
    """Whether any process has raised its hand. All processes learn it at the same call, one call later.

    A call sends off a reduction of one bit per device and reads the result of the call before it, which the step in
    between has already waited for: nobody waits for the vote itself.
    """

    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp

        self._mesh = jax.sharding.Mesh(jax.devices(), ("device",))
        self._spread = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec("device"))
        everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._any = jax.jit(jnp.any, out_shardings=everywhere)
        self._before: Any = False

    def __call__(self, hand: bool) -> bool:
        import jax
        import numpy as np

        with jax.set_mesh(self._mesh):  # an evaluation votes inside its own
            hands = jax.make_array_from_callback(self._mesh.devices.shape, self._spread, lambda _: np.array([hand]))
            before, self._before = self._before, in_turn(self._any(hands))
        return bool(before)


def in_turn(result: Any) -> Any:
    """Wait for a program on several CPU devices before the next is sent off; elsewhere do nothing."""
    import jax

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(result)
    return result


# Losing one another -----------------------------------------------------------------------------------------------

_LOST = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|gloo|nccl|connection|heartbeat", re.IGNORECASE)


@contextlib.contextmanager
def naming_lost_peers(doing: str) -> Iterator[None]:
    """Turns what JAX raises when another process is gone, or does not answer in time, into a StallError."""
    try:
        yield
    except RuntimeError as error:
        if _started is None or not _LOST.search(str(error)):
            raise
        raise StallError(
            f"{doing}: another process is gone or stuck ({_short(error)}); what the first to end said is the cause; "
            "run again to go on from the last checkpoint"
        ) from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
