"""Several processes as one run: they connect, agree and wait for each other."""

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from lmjax.errors import ConfigError, StallError, one_line
from lmjax.process import messages, start_up
from lmjax.process.cluster import Cluster, detect, listening_address, tpu_metadata
from lmjax.process.lifeline import Lifeline

logger = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 100  # after which JAX would abort; the lifeline has noticed by then, and says what is wrong
ANSWER_SECONDS = 1200.0  # how long one process waits for another to write, hash or read its share of a checkpoint
PATIENCE_SECONDS = 86_400.0  # how long all wait for process 0 to prepare data, or to write the report
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
    messages.show_warnings(f"lmjax: {name()}")
    say(f"coordinator {cluster.coordinator} (from {cluster.source})")
    begin = time.monotonic()
    listen = listening_address(environment, cluster)
    _lifeline = Lifeline(cluster.coordinator, cluster.process, cluster.processes, timeout, start_up.program(), listen)
    _lifeline.watch(on_loss, say)
    _connect(cluster, timeout, listen)

    import jax

    seconds = time.monotonic() - begin
    with naming_lost_peers("looking for devices"):
        here, all_devices = jax.local_device_count(), jax.device_count()
    say(f"connected in {seconds:.1f} s; {here} of {all_devices} devices are here")
    if not is_leader():
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


def _connect(cluster: Cluster, timeout: float, listen: str) -> None:
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from signals.Preemption
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
        coordinator_bind_address=f"[{listen}]:{cluster.port}" if ":" in listen else f"{listen}:{cluster.port}",
    )
    if jax.default_backend() == "cpu":
        _compile_alike()


def _compile_alike() -> None:
    """Have several processes on CPUs find the same programs in the compile cache, and begin each together.

    The key of a program has the topology in it, which names the process: only process 0, which alone writes the cache,
    would ever find one there. And Gloo gives up after 30 s of waiting for the others, which may be compiling. Both are
    JAX's inner parts; where they are others, nothing is changed.
    """
    from jax._src import cache_key as keys
    from jax._src import compiler as compilers

    cache_key: Any = keys
    compiler: Any = compilers
    if hasattr(cache_key, "_hash_accelerator_config") and hasattr(cache_key, "_hash_devices"):
        cache_key._hash_accelerator_config = cache_key._hash_devices
    compiled = getattr(compiler, "compile_or_get_cached", None)
    if compiled is None:
        return

    def together(backend: Any, module: Any, devices: Any, *rest: Any, **named: Any) -> Any:
        made = compiled(backend, module, devices, *rest, **named)
        if len({device.process_index for device in devices.flat}) == processes():
            barrier(f"compiling {module.operation.attributes['sym_name']}")
        return made

    compiler.compile_or_get_cached = together


def process() -> int:
    return 0 if _started is None else _started.process


def processes() -> int:
    return 1 if _started is None else _started.processes


def is_leader() -> bool:
    """Whether this is process 0, which writes what the run leaves behind."""
    return process() == 0


def name() -> str:
    """`process 2 of 4: `, for messages; empty on a single process."""
    return "" if _started is None else f"process {_started.process} of {_started.processes}: "


def say(text: str) -> None:
    print(f"lmjax: {name()}{text}", file=sys.stderr, flush=True)


def gather(what: str, value: Any, seconds: float = ANSWER_SECONDS) -> list[Any]:
    """Return the JSON values of all processes in their order at process 0, and an empty list elsewhere.

    Every process calls this, `broadcast` and `barrier` in the same order for the same `what`. Raises StallError when a
    process does not answer within `seconds`.
    """
    if _started is None:
        return [value]
    key = _next_key(what)
    if not is_leader():
        _client().key_value_set(f"{key}/{process()}", json.dumps(value))
        return []
    end, values = time.monotonic() + seconds, [value]
    for other in range(1, processes()):
        values.append(json.loads(_wait_for(f"{key}/{other}", what, other, end - time.monotonic())))
    _client().key_value_delete(key)
    return values


def broadcast(what: str, value: Any, seconds: float = ANSWER_SECONDS) -> Any:
    """Return the JSON value of process 0 at every process; what the others pass does not matter."""
    if _started is None:
        return value
    key = _next_key(what)
    if is_leader():
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
    if not is_leader():
        barrier(what, seconds)
    yield
    if is_leader():
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
        replicated = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._any = jax.jit(jnp.any, out_shardings=replicated)
        self._before: Any = False

    def __call__(self, hand: bool) -> bool:
        import jax
        import numpy as np

        with jax.set_mesh(self._mesh):  # an evaluation votes inside its own
            hands = jax.make_array_from_callback(self._mesh.devices.shape, self._spread, lambda _: np.array([hand]))
            before, self._before = self._before, wait_on_cpu(self._any(hands))
        return bool(before)


def run(program: Callable[..., Any], *arguments: Any) -> Any:
    """What a program returns. On a CPU it has run by then, and that this thread waited for it is counted."""
    import jax

    if jax.default_backend() != "cpu":
        return program(*arguments)
    begin = time.monotonic()
    result = jax.block_until_ready(program(*arguments))
    _waiting.seconds = waited() + time.monotonic() - begin
    return result


def wait_on_cpu(result: Any) -> Any:
    """Block until a program on several CPU devices is done, before the next is sent off; elsewhere do nothing."""
    import jax

    return run(lambda: result) if jax.device_count() > 1 else result


_waiting = threading.local()  # runs may train side by side, each in a thread


def waited() -> float:
    """How many seconds this thread has waited for programs on a CPU since it started."""
    return getattr(_waiting, "seconds", 0.0)


_STATUS = re.compile(r"[A-Z_]+: ")  # as the errors of XLA and of TensorStore begin
_OF_STORAGE = re.compile(r" \[[a-z_]+='")  # as those of TensorStore end; the path in them may say anything
_LOST = re.compile(r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|gloo|nccl|connection|heartbeat", re.IGNORECASE)


@contextlib.contextmanager
def naming_lost_peers(doing: str) -> Iterator[None]:
    """Turns what JAX raises when another process is gone, or does not answer in time, into a StallError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # an array whose program failed on its way is read with a ValueError
        said = str(error)
        of_array = type(error) is ValueError and _STATUS.match(said) and not _OF_STORAGE.search(said)
        if _started is None or not (isinstance(error, RuntimeError) or of_array) or not _LOST.search(said):
            raise
        raise StallError(
            f"{doing}: another process is gone or stuck ({one_line(error, 200)}); what the first to end said is the "
            "cause; run again to go on from the last checkpoint"
        ) from error
