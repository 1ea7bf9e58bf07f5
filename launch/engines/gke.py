"""Kubernetes on Google Cloud: a JobSet for each cell, in a queue of Kueue.

A cell that was preempted or lost a host starts again, one that failed stays failed. --image has this checkout in its
working directory (launch/Dockerfile makes it). Beside the manifests stand the lines for xpk that mean the same.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from launch.engines.machines import Machines, machines, output, shell_line
from launch.job import MAX_RESTARTS, Hardware, Job, dns_name
from lmjax.errors import BUG, DONE, CheckpointError, ConfigError, DataError, NumericalError
from lmjax.record import files

# The labels of node pools: of TPUs by their family, of GPUs by their name (xpk 1.16, core/system_characteristics.py).
TPUS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
GPUS = {
    "L4": "nvidia-l4",
    "A100": "nvidia-tesla-a100",
    "H100": "nvidia-h100-80gb",
    "H200": "nvidia-h200-141gb",
    "B200": "nvidia-b200",
    "GB200": "nvidia-gb200",
}
SWEEP = "lmjax-sweep"
FINAL = [BUG, *(error.exit_code for error in (ConfigError, DataError, CheckpointError, NumericalError))]
"""What another start would not mend."""
GRACE_SECONDS = 300
_PORT = 8476
WAITS = False


def add_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--image", metavar="NAME", help="has this checkout and its packages")
    parser.add_argument("--queue", default="multislice-queue", metavar="NAME", help="of Kueue; default: xpk's")
    parser.add_argument("--cluster", default="CLUSTER", metavar="NAME", help="in the line for xpk")


def render(
    name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace
) -> dict[str, str]:
    """A manifest for each cell, and for TPUs the lines for xpk. Raises ConfigError without an image or a bucket, and
    for accelerators that have no node pool."""
    if not arguments.image:
        raise ConfigError("--engine=gke needs --image=NAME, a container with this checkout; see launch/Dockerfile")
    if not files.is_remote(directory):
        raise ConfigError(f"--out={directory}: the pods share no disk; name a bucket, such as gs://mine/sweeps/first")
    on = machines(hardware)
    manifests = [jobset(name, job, on, hardware.spot, arguments.image, arguments.queue) for job in _ordered(jobs)]
    rendered = {f"{one['metadata']['name']}.yaml": yaml.safe_dump(one, sort_keys=False) for one in manifests}
    if on.shape:
        rendered["xpk.sh"] = "".join(_xpk(job, on, hardware.spot, arguments) + "\n" for job in _ordered(jobs))
    return rendered


def submit(name: str, directory: str, jobs: Sequence[Job], hardware: Hardware, arguments: argparse.Namespace) -> int:
    """Apply the manifests in kubectl's current context. What has ended is replaced, what waits or runs left alone."""
    manifests = [text for file, text in render(name, directory, jobs, hardware, arguments).items() if file != "xpk.sh"]
    found = json.loads(output("kubectl", "get", "jobsets", f"--selector={SWEEP}={dns_name(name)}", "--output=json"))
    wanted = {job.name for job in jobs}
    ended = [one["metadata"]["name"] for one in found["items"] if one.get("status", {}).get("terminalState")]
    if again := sorted(wanted.intersection(ended)):
        output("kubectl", "delete", "jobset", *again)
    print(output("kubectl", "apply", "--filename=-", given="---\n".join(manifests)), end="")
    return DONE


def stop(name: str, directory: str, jobs: Sequence[Job]) -> int:
    """Delete the JobSets: the pods get SIGTERM, and five minutes to save."""
    names = [job.name for job in jobs]
    print(output("kubectl", "delete", "jobset", "--ignore-not-found", "--wait=false", *names), end="")
    return DONE


def jobset(sweep: str, job: Job, on: Machines, spot: bool, image: str, queue: str) -> dict[str, Any]:
    """The JobSet of a cell: one replicated job, a replica for each slice, a pod for each host."""
    give_up = {"name": "give-up", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    final = {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": FINAL}}
    labels = {"kueue.x-k8s.io/queue-name": queue, SWEEP: dns_name(sweep)}
    metadata: dict[str, Any] = {"name": job.name, "labels": labels}
    if on.shape:  # all hosts of a slice come from one node pool, which is one slice
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    of_slice = {
        "parallelism": on.hosts,
        "completions": on.hosts,
        "backoffLimit": 0,  # a lost pod, preempted or ended with 6 or 75, fails the job: the JobSet starts all again
        "podFailurePolicy": {"rules": [final]},
        "template": {"spec": _pod(job, on, spot, image)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": MAX_RESTARTS, "rules": [give_up]},
            "replicatedJobs": [{"name": "slice", "replicas": on.slices, "template": {"spec": of_slice}}],
        },
    }


def _pod(job: Job, on: Machines, spot: bool, image: str) -> dict[str, Any]:
    variables = [{"name": name, "value": value} for name, value in job.environment.items()]
    if not on.shape and on.hosts > 1:
        variables += _places(job, on)
    container: dict[str, Any] = {"name": "train", "image": image, "command": ["python", *job.command[1:]]}
    if variables:
        container["env"] = variables
    if on.shape:
        container["securityContext"] = {"privileged": True}  # as xpk has it: locked memory for the TPU's driver
    if on.kind:
        container["resources"] = {"limits": {_resource(on): on.devices_of_host}}
    container["volumeMounts"] = [{"name": "memory", "mountPath": "/dev/shm"}]
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE_SECONDS}
    if on.shape:  # the network between slices at its full rate
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    selected = _node_pool(on) | ({"cloud.google.com/gke-spot": "true"} if spot else {})
    if selected:
        pod["nodeSelector"] = selected
    tolerated = [{"key": _resource(on), "operator": "Exists"}] if on.kind else []
    tolerated += [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}] if spot else []
    if tolerated:
        pod["tolerations"] = tolerated
    volumes = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    return {**pod, "containers": [container], "volumes": volumes}


def _places(job: Job, on: Machines) -> list[dict[str, Any]]:
    """What tells each of several hosts its place; for TPUs GKE does."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "LMJAX_COORDINATOR", "value": f"{job.name}-slice-0-0.{job.name}:{_PORT}"},
        {"name": "LMJAX_PROCESSES", "value": str(on.hosts)},
        {"name": "LMJAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _resource(on: Machines) -> str:
    return "google.com/tpu" if on.shape else "nvidia.com/gpu"


def _node_pool(on: Machines) -> dict[str, str]:
    if on.kind is None:
        return {}
    if on.shape:
        shape = "x".join(map(str, on.shape))
        return {"cloud.google.com/gke-tpu-accelerator": TPUS[on.kind], "cloud.google.com/gke-tpu-topology": shape}
    if on.kind not in GPUS:
        raise ConfigError(f"--accelerator={on.kind}: GKE has {', '.join(GPUS)}")
    return {"cloud.google.com/gke-accelerator": GPUS[on.kind]}


def _xpk(job: Job, on: Machines, spot: bool, arguments: argparse.Namespace) -> str:
    family = "v5litepod" if on.kind == "v5e" else on.kind
    flags = {
        "workload": job.name,
        "cluster": arguments.cluster,
        "tpu-type": f"{family}-{'x'.join(map(str, on.shape))}",
        "num-slices": on.slices,
        "docker-image": arguments.image,
        "command": shell_line(job, "python"),
        "max-restarts": MAX_RESTARTS,
        "restart-on-exit-codes": "6,75",
        "termination-grace-period-seconds": GRACE_SECONDS,
    }
    return shlex.join(["xpk", "workload", "create", *(f"--{k}={v}" for k, v in flags.items()), *["--spot"] * spot])


def _ordered(jobs: Sequence[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: -job.flops)  # Kueue starts the first that came
