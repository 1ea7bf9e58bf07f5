"""Who this process is among several: from flags, a TPU's metadata, SkyPilot or Slurm."""

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lmjax.errors import ConfigError

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

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


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


def listening_address(environment: Mapping[str, str], cluster: Cluster) -> str:
    """The IP address that process 0 listens at: LMJAX_LISTEN; else that of a coordinator that is this machine itself,
    such as localhost, which nobody else reaches; else `::`, all that the machine has.

    Raises ConfigError for what is no IP address.
    """
    host = cluster.coordinator.rpartition(":")[0].strip("[]")
    loopback = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}
    address = environment.get("LMJAX_LISTEN") or loopback.get(host, "::")
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        raise ConfigError(f"LMJAX_LISTEN={address!r} is not an IP address of this machine, such as 10.0.0.1") from None


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
    """What GKE would have put into the environment, from the metadata server of a TPU VM; elsewhere nothing."""
    known = any(environment.get(name) for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "LMJAX_PROCESSES"))
    if known or environment.get("TPU_SKIP_MDS_QUERY") or not _has_tpu():
        return {}
    import urllib.error
    import urllib.request

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
