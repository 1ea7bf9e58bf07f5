"""The process around training: exit codes, signals, re-execution, fault hooks."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from lmjax.errors import ConfigError
from lmjax.process import faults, signals, start_up


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LMJAX_FAULTS")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def run(code: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    process = start(code, *arguments, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# Exit codes -----------------------------------------------------------------------------------------------------------

MAIN = """
    import errno, sys
    from lmjax.errors import *
    from lmjax.process.ending import run_main
    def function():
        {body}
    run_main(function, debug={debug})
"""


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("return None", 0, ""),
        ("return 75", 75, ""),
        ("raise ConfigError('a: b; c')", 2, "lmjax: error: a: b; c"),
        ("raise DataError('x')", 3, "lmjax: error: x"),
        ("raise CheckpointError('x')", 4, "lmjax: error: x"),
        ("raise NumericalError('x')", 5, "lmjax: error: x"),
        ("raise StallError('two\\n  lines')", 6, "lmjax: error: two lines"),
        ("raise OSError(errno.ENOSPC, 'No space left', '/x')", 4, "lmjax: error: storage: [Errno 28] No space left"),
        ("raise KeyboardInterrupt", 130, "lmjax: error: interrupted"),
        ("return 1 // 0", 1, "lmjax: error: ZeroDivisionError: integer division or modulo by zero (this is a bug; "),
    ],
)
def test_exit_codes_and_the_last_line(body: str, code: int, line: str) -> None:
    returned, _, err = run(MAIN.format(body=body, debug=False))
    assert returned == code
    assert err.startswith(line) and len(err.splitlines()) == bool(line)
    if code == 1:
        report = Path(err.split("traceback in ")[1].rstrip().rstrip(")"))
        assert "ZeroDivisionError" in report.read_text()
        report.unlink()


def test_debug_shows_the_traceback_and_the_line_stays_last() -> None:
    _, _, err = run(MAIN.format(body="raise DataError('x')", debug=True))
    assert "Traceback" in err and err.splitlines()[-1] == "lmjax: error: x"


def test_a_hanging_thread_does_not_hold_up_an_error() -> None:
    body = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); raise DataError('x')"
    clock = time.monotonic()
    assert run(MAIN.format(body=body, debug=False))[0] == 3
    assert time.monotonic() - clock < 20


# Start-up -------------------------------------------------------------------------------------------------------------

TUNED = """
    import json, os, sys
    before = os.environ.get("GLIBC_TUNABLES")
    from lmjax.process.start_up import tune_allocator
    tune_allocator()
    assert "jax" not in sys.modules
    json.dump([os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], os.getpid(), sys.flags.optimize, sys.executable,
               sys.prefix], sys.stdout)
"""

glibc = pytest.mark.skipif(not start_up._on_glibc(), reason="needs glibc")


@glibc
def test_the_process_replaces_itself_once_with_the_same_arguments() -> None:
    process = start(TUNED, "train", "--config=a b.py", "")
    out, err = process.communicate(timeout=60)
    assert not err
    tunables, arguments, pid, *_ = json.loads(out)
    assert (tunables, arguments, pid) == (start_up.TUNABLES, ["train", "--config=a b.py", ""], process.pid)


KEPT = """
    import ctypes
    from lmjax.process import start_up
    start_up.tune_allocator()
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

    def use(mebibytes):
        block = c.malloc(mebibytes << 20)
        ctypes.memset(block, 1, mebibytes << 20)
        c.free(block)

    before = resident()
    use(256)
    kept = resident()
    start_up.give_back_memory()
    left = resident()
    print(kept - before, left - before)
"""


@glibc
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    process = start(KEPT)
    out, err = process.communicate(timeout=60)
    assert not err
    kept, left = map(int, out.split())
    assert kept >= 250 and left < 50, out


IN_TURN = """
    import jax
    from lmjax.process import start_up

    start_up.run_in_turn()
    x = jax.numpy.ones((1024, 1024))
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 16, lambda _, y: y @ x, x).sum())
    print(*(program(x + i).is_ready() for i in range(3)))
"""


def test_a_call_returns_when_its_program_has_run() -> None:
    out, err = start(IN_TURN).communicate(timeout=60)
    assert out.split() == ["True"] * 3, out + err


@glibc
@pytest.mark.parametrize("how", ["module", "script"])
def test_it_is_run_again_the_way_it_was_started(tmp_path: Path, how: str) -> None:
    (tmp_path / "tuned.py").write_text(textwrap.dedent(TUNED))
    how_arguments = {"module": ["-O", "-m", "tuned"], "script": ["-O", str(tmp_path / "tuned.py")]}[how]
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, *how_arguments, "x"],
        cwd=tmp_path,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    tunables, arguments, _, optimize, executable, prefix = json.loads(done.stdout)
    assert tunables and arguments == ["x"] and optimize == 1
    assert (executable, prefix) == (sys.executable, sys.prefix)


@pytest.mark.parametrize("environment", [{"GLIBC_TUNABLES": ""}, {"JAX_PLATFORMS": "cuda"}])
def test_it_stays_as_it_is(environment: dict[str, str]) -> None:
    _, out, _ = run(TUNED, **environment)
    assert not json.loads(out)[0]


CACHED = """
    import sys
    import jax, jax.numpy as jnp
    from functools import partial
    from lmjax.process.start_up import enable_compile_cache
    enable_compile_cache(sys.argv[1])
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    @partial(jax.jit, donate_argnums=0)
    def step(state, x):
        def body(carry, w):
            carry = jnp.tanh(carry @ w) + jax.nn.softmax(carry)
            return carry, carry.sum()
        out, sums = jax.lax.scan(body, x, state["w"])
        loss, grads = jax.value_and_grad(lambda w: jax.lax.scan(body, x, w)[0].std())(state["w"])
        return {"w": state["w"] - 0.1 * grads, "m": state["m"] * 0.9 + sums}, loss
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    key = jax.random.key(0)
    state = {"w": jax.random.normal(key, (5, 48, 48)), "m": jnp.zeros(5)}
    x = jax.random.normal(key, (16, 48))
    for _ in range(5):
        state, loss = step(state, x)
    print(float(loss).hex(), *(float(leaf.sum()).hex() for leaf in jax.tree.leaves(state)))
    print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_a_cached_program_computes_the_same_bits_with_donated_buffers(tmp_path: Path) -> None:
    (_, first, _), (_, second, err) = (run(CACHED, str(tmp_path)) for _ in range(2))
    assert first.splitlines()[0] == second.splitlines()[0], err
    assert int(first.splitlines()[1]) < int(second.splitlines()[1])


# Signals and stalls ---------------------------------------------------------------------------------------------------

LOOP = """
    import sys, time
    from lmjax.process.signals import Preemption
    with Preemption() as preemption:
        print("ready", flush=True)
        while not preemption.requested:
            time.sleep(0.01)
        print("saving", flush=True)
        time.sleep(float(sys.argv[1]))
    sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    process = start(LOOP, "0")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (75, "saving\n")
    assert err == f"lmjax: {number.name}: saving at the next step boundary (again to exit at once)\n"

    process = start(LOOP, "60")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
    time.sleep(1.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == f"lmjax: error: second {number.name}: exit without saving"


def test_signals_that_come_together_are_one() -> None:
    """As when a scheduler signals a process and its parent, which passes it on."""
    process = start(LOOP, "0.5")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75 and err.count("SIGTERM") == 1


def test_a_second_signal_ends_even_while_the_main_thread_is_in_native_code() -> None:
    code = """
        import hashlib
        from lmjax.process.signals import Preemption
        with Preemption():
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, and no bytecode in between
    """
    process = start(code)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(2):
        time.sleep(1.1)
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_signal_before_there_is_anything_to_save_ends_at_once() -> None:
    process = start("""
        import time
        from lmjax.process import ending
        ending.leave_on_sigterm()
        print("ready", flush=True)
        time.sleep(100)
    """)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert err == "lmjax: error: SIGTERM before the first step: nothing to save; run the same command again\n"


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.Preemption() as preemption:
        assert not preemption.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_watchdog_ends_a_stalled_process_with_its_stacks() -> None:
    code = """
        import time
        from lmjax.process.signals import Watchdog
        def stuck():
            time.sleep(60)
        with Watchdog(1.0) as watchdog:
            for step in range(8):
                watchdog.beat(f"step {step}")
                time.sleep(0.2)
            stuck()
    """
    clock = time.monotonic()
    returned, _, err = run(code)
    assert returned == 6 and time.monotonic() - clock < 30
    assert "in stuck" in err
    assert err.splitlines()[-1].startswith("lmjax: error: no progress for 1 s during step 7; ")


def test_a_watchdog_that_is_left_or_off_watches_nothing() -> None:
    for timeout in (0.05, None):
        with signals.Watchdog(timeout) as watchdog:
            watchdog.beat("work")
        time.sleep(0.2)


# Faults ---------------------------------------------------------------------------------------------------------------


def test_faults_fire_where_they_were_asked_to(monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(faults, "_calls", {})
    monkeypatch.setenv("LMJAX_FAULTS", "nan_grad@step:3,raise@summary.write:2,nan_grad@step:5")
    assert [faults.fault("step", n) for n in range(1, 7)] == [None, None, "nan_grad", None, "nan_grad", None]
    assert faults.fault("report.write") is None and faults.fault("summary.write") is None
    with pytest.raises(RuntimeError, match="injected"):
        faults.fault("summary.write")
    assert faults.fault("summary.write") is None
    assert capfd.readouterr().err.splitlines() == [
        "lmjax: LMJAX_FAULTS: nan_grad at step:3",
        "lmjax: LMJAX_FAULTS: nan_grad at step:5",
        "lmjax: LMJAX_FAULTS: raise at summary.write:2",
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("kill", "kill@step", "explode@step:3", "kill@step:x", "kill@:3"),
        *("kill@setp:3", "kill@step:3,raise@step:3", "nan_grad@checkpoint.write:1"),
    ],
)
def test_malformed_faults_are_refused(monkeypatch: Any, text: str) -> None:
    monkeypatch.setenv("LMJAX_FAULTS", text)
    with pytest.raises(ConfigError, match="LMJAX_FAULTS"):
        faults.fault("step", 1)


def test_without_the_variable_there_are_no_faults(monkeypatch: Any) -> None:
    monkeypatch.delenv("LMJAX_FAULTS", raising=False)
    assert faults.fault("step", 1) is None


@pytest.mark.parametrize(
    ("platforms", "files", "found"),
    [
        ("", (), None),
        ("", ("/dev/nvidiactl",), "gpu"),
        ("", ("/dev/accel0",), "tpu"),
        ("cpu", ("/dev/nvidiactl",), None),
        ("cuda,cpu", (), "gpu"),
        ("tpu", (), "tpu"),
    ],
)
def test_an_accelerator_is_what_is_asked_for_or_what_has_a_driver(
    monkeypatch: Any, platforms: str, files: tuple[str, ...], found: str | None
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(os.path, "exists", lambda path: path in files)
    assert start_up.accelerator() == found


# Facts ----------------------------------------------------------------------------------------------------------------


def test_environment_is_json_with_versions_revision_and_flags(monkeypatch: Any) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    facts = start_up.environment()
    assert facts["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
    json.dumps(facts)
    assert {"jax", "python", "device_kind", "device_count", "cpu_cores"} <= facts.keys()
