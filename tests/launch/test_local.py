"""Several processes on one machine: places, output, signals and exit codes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from launch.local import causes_first, environment, exit_code


def start(code: str, processes: int = 3, *flags: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "launch", "local", f"--processes={processes}", *flags]
    command = [*launcher, "--", sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(code: str, processes: int = 3, *flags: str) -> tuple[int, str, str]:
    process = start(code, processes, *flags)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_every_process_knows_its_place_and_its_lines_say_whose_they_are() -> None:
    code, out, err = run(
        """
        import os, sys
        number = os.environ["LMJAX_PROCESS_ID"]
        print(number, os.environ["LMJAX_PROCESSES"], os.environ["LMJAX_COORDINATOR"], flush=True)
        print("warning", number, file=sys.stderr)
        """
    )
    assert code == 0
    lines = sorted(out.splitlines())
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["[0] 0 3", "[1] 1 3", "[2] 2 3"]
    assert len({line.rsplit(" ", 1)[1] for line in lines}) == 1 and "localhost:" in lines[0]
    assert sorted(err.splitlines()) == ["[0] warning 0", "[1] warning 1", "[2] warning 2"]


def test_devices_are_those_asked_for_and_the_rest_stays_as_it_is() -> None:
    """Whatever number of them the environment names."""
    base = {"JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "x"}
    variables = environment(base | {"HOME": "/h"}, "localhost:1", 2, 4, 8)
    assert (variables["JAX_PLATFORMS"], variables["HOME"]) == ("cpu", "/h")
    count = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    assert subprocess.run(count, env=os.environ | variables, capture_output=True, text=True).stdout == "8\n"


@pytest.mark.parametrize(
    ("codes", "one"),
    [([0, 0], 0), ([0, 3, 6], 3), ([6, 3], 3), ([75, 75], 75), ([6, 75], 75), ([0, -9, 6], 137), ([-15, -15], 143)],
)
def test_one_exit_code_for_all(codes: list[int], one: int) -> None:
    assert exit_code(codes) == one


def test_who_lost_a_peer_is_not_the_cause() -> None:
    assert causes_first([(0, 6), (1, 4), (2, 6), (3, 0)]) == [(1, 4), (3, 0), (0, 6), (2, 6)]


def test_the_first_failure_counts_and_the_others_get_time_to_end() -> None:
    code, out, _ = run(
        """
        import os, sys, time
        if os.environ["LMJAX_PROCESS_ID"] == "1":
            sys.exit(3)
        time.sleep(1)
        print("in time")
        sys.exit(6)
        """
    )
    assert code == 3 and sorted(out.splitlines()) == ["[0] in time", "[2] in time"]


def test_who_does_not_end_is_killed() -> None:
    clock = time.monotonic()
    code, _, _ = run(
        """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ["LMJAX_PROCESS_ID"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
        """,
        3,
        "--grace=0.5",
    )
    assert code == 137 and time.monotonic() - clock < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process(number: signal.Signals) -> None:
    process = start(
        """
        import signal, sys, time
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: (print(number, flush=True), sys.exit(75)))
        print("ready", flush=True)
        time.sleep(100)
        """
    )
    assert process.stdout is not None
    assert sorted(process.stdout.readline() for _ in range(3)) == [f"[{i}] ready\n" for i in range(3)]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and sorted(out.splitlines()) == [f"[{i}] {int(number)}" for i in range(3)]


def test_nothing_is_left_when_the_launcher_is_killed() -> None:
    """Neither its processes nor theirs, even while they ignore signals."""
    process = start(
        """
        import os, signal, subprocess, sys, time
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        print(os.getpid(), subprocess.Popen(["sleep", "100"]).pid, flush=True)
        time.sleep(100)
        """
    )
    assert process.stdout is not None
    numbers = [int(number) for _ in range(3) for number in process.stdout.readline().split()[1:]]
    process.kill()
    process.communicate(timeout=30)  # until nobody holds its pipes any more
    end = time.monotonic() + 10
    while any(map(is_running, numbers)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_who_has_left_the_group_does_not_hold_up_the_end() -> None:
    clock = time.monotonic()
    code, out, _ = run(
        """
        import subprocess
        print(subprocess.Popen(["sleep", "100"], start_new_session=True).pid, flush=True)
        """,
        1,
    )
    os.kill(int(out.split()[1]), signal.SIGKILL)
    assert code == 0 and time.monotonic() - clock < 50


def is_running(process: int) -> bool:
    """A zombie is not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


def test_who_has_no_reader_any_more_ends() -> None:
    process = start("while True: print('line' * 100, flush=True)")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 1  # the BrokenPipeError of the processes


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["local", "--processes=2"], "say what to start, after `--`"),
        (["local", "--processes=2", "--"], "say what to start, after `--`"),
        (["local", "--processes=2", "lmjax", "train"], "say what to start, after `--`"),
        (["local", "--processes=2", "--hosts=2", "--", "true"], "unrecognized arguments: --hosts=2"),
        (["local", "--processes=0", "--", "true"], "'0' is not a positive number"),
        (["local", "--processes=2", "--", "no-such-command"], "cannot start no-such-command: No such file"),
        (["mars", "--", "true"], "invalid choice: 'mars'"),
    ],
)
def test_mistakes_are_named(arguments: list[str], problem: str) -> None:
    done = subprocess.run([sys.executable, "-m", "launch", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and problem in done.stderr


def test_the_launcher_never_imports_jax() -> None:
    code = "import sys; import launch.__main__; assert not {'jax', 'numpy'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
