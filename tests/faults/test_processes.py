"""Several processes, one of which dies, stands still, has no room or is another version: the others end and say so."""

import ipaddress
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.black_box import CONFIG, ENVIRONMENT, ROOT, Result, finished, hashes, lmjax, start, train, wait_for

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
SETTINGS = ("--config.model.vocab=264", "--config.data.prefetch=1")


def launch(corpus: Path, workdir: Path, *words: str, grace: int = 20, before: str = "", **environment: str) -> Any:
    """Two processes that train, started; `before` is Python that each runs first."""
    program = f"{before}\nimport runpy; runpy.run_module('lmjax', run_name='__main__', alter_sys=True)"
    launcher = ["-m", "launch", "local", "--processes=2", f"--grace={grace}", "--", sys.executable, "-c", program]
    command = ["train", f"--config={CONFIG}:{corpus}", f"--workdir={workdir}", *SETTINGS, *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *launcher, *command], env=os.environ | ENVIRONMENT | environment, cwd=ROOT, **pipes
    )


def last_line(result: Result, process: int) -> str:
    """Of one of the processes."""
    lines = [line for line in result.err.splitlines() if line.startswith(f"[{process}] ")]
    assert lines and lines[-1].startswith(f"[{process}] lmjax: error: process {process} of 2: "), result.err
    return lines[-1]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Who is lost ----------------------------------------------------------------------------------------------------------


def test_a_killed_process_is_named_with_the_last_good_step(corpus: Path, whole: Path, tmp_path: Path) -> None:
    result = finished(launch(corpus, tmp_path / "run", LMJAX_FAULTS="kill@step:7:1"))
    assert result.code == 137 and "process 1 was the first not to end well (killed by SIGKILL)" in result.err
    line = last_line(result, 0)
    assert re.search(r"gone.*; the last good step is 4$", line), line
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_a_process_that_stands_still_is_given_up_and_writes_no_more(corpus: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    running = launch(corpus, workdir, grace=60, LMJAX_FAULTS="stop@step:7:1")
    wait_for(lambda: len(_children(running.pid)) >= 2, running)
    (stopped,) = [pid for pid in _children(running.pid) if _process_id(pid) == "1"]
    wait_for(lambda: _state(stopped) == "T", running)
    wait_for(lambda: len([pid for pid in _children(running.pid) if _process_id(pid)]) == 1, running)
    before = contents(workdir)
    os.kill(stopped, signal.SIGCONT)
    result = finished(running)
    assert result.code == 6, result
    assert "process 1 has been silent for 30 s" in last_line(result, 0)
    assert last_line(result, 0).endswith("the last good step is 4") and last_line(result, 1)
    assert contents(workdir) == before


# Sockets --------------------------------------------------------------------------------------------------------------


def test_processes_of_one_machine_listen_at_none_of_its_other_addresses(corpus: Path, tmp_path: Path) -> None:
    """Nor at all of them. Gloo takes the address of the machine's name."""
    running = launch(corpus, tmp_path / "run", LMJAX_FAULTS="pause@step:3")
    wait_for(lambda: (tmp_path / "run" / "ledger.jsonl").exists(), running)
    found = {address for pid in _children(running.pid) for address in _listening(pid)}
    finished(running).done()
    assert any(address.is_loopback for address in found)
    assert not any(address.is_unspecified for address in found), found


def _listening(pid: int) -> set[Address]:
    """The addresses of the TCP sockets at which a process listens."""
    links = [_readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = [
        row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    return {_address(row[1]) for row in rows if row[3] == "0A" and row[9] in inodes}


def _readlink(link: Path) -> str:
    """Where a link leads, "" once it is gone: a running process opens and closes files."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def _address(text: str) -> Address:
    """`0100007F:1F90` as the kernel writes it, words in this machine's order: `127.0.0.1`."""
    words = text.partition(":")[0]
    packed = b"".join(int(words[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    return getattr(address, "ipv4_mapped", None) or address


def _children(parent: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True)
    return [pid for pid in map(int, listed.stdout.split()) if _process_id(pid)]


def _process_id(pid: int) -> str:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((name[17:].decode() for name in variables if name.startswith(b"LMJAX_PROCESS_ID=")), "")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("word", [None, pytest.param("another attempt's", marks=pytest.mark.slow)])
def test_who_was_given_up_writes_no_more(corpus: Path, whole: Path, tmp_path: Path, word: str | None) -> None:
    """What the others do when they give up is done here in their place."""
    workdir = tmp_path / "run"
    assert train(corpus, workdir, LMJAX_FAULTS="terminate@step:6").code == 75
    command = ("train", f"--config={CONFIG}:{corpus}", f"--workdir={workdir}", "--config.checkpoint.every=100")
    running = start(*command, LMJAX_FAULTS="stop@step:9")
    wait_for(lambda: _state(running.pid) == "T", running)
    if word is None:
        (workdir / ".lease").unlink()
    else:
        (workdir / ".lease").write_text(word)
    before = contents(workdir)
    time.sleep(1.1)
    os.kill(running.pid, signal.SIGCONT)
    result = finished(running)
    result.refused(6, "gave this process up", "the last good step is 6")
    after = contents(workdir)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"metrics.jsonl", "ledger.jsonl"}, changed  # a line of the step that had begun, how it ended
    train(corpus, workdir).done()
    assert hashes(workdir) == hashes(whole)
    lmjax("verify", workdir).done()


# Who does not fit -----------------------------------------------------------------------------------------------------


def test_another_version_at_one_process_is_noticed(corpus: Path, tmp_path: Path) -> None:
    before = (
        "import os; from lmjax.process import start_up\n"
        "if os.environ['LMJAX_PROCESS_ID'] == '1': start_up.program = lambda: 'lmjax 9.9 (0) on jax 9'"
    )
    result = finished(launch(corpus, tmp_path / "run", "--start-timeout=5", before=before))
    assert result.code == 2, result
    assert "it runs lmjax 9.9 (0) on jax 9, process 0 lmjax 0.1.0 (" in last_line(result, 1)
    assert "missing: 1" in last_line(result, 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_full_disk_at_one_process_is_the_cause(corpus: Path, tmp_path: Path, process: int) -> None:
    result = finished(launch(corpus, tmp_path / "run", LMJAX_FAULTS=f"disk_full@checkpoint.write:1:{process}"))
    assert result.code == 4, result
    assert "was not saved: No space left on device" in last_line(result, process)
    assert last_line(result, 1 - process)


# Compiling ------------------------------------------------------------------------------------------------------------

SLOW_TO_COMPILE = """
import os, time
from jax._src import compiler
compile = compiler.backend_compile_and_load
def slowly(backend, module, *rest):
    if os.environ["LMJAX_PROCESS_ID"] == "1" and "jit_step" in str(module.operation.attributes["sym_name"]):
        time.sleep(40)
    return compile(backend, module, *rest)
compiler.backend_compile_and_load = slowly
"""


@pytest.mark.slow
def test_who_compiles_for_longer_is_waited_for(corpus: Path, tmp_path: Path) -> None:
    """Gloo would wait for 30 s."""
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    assert finished(launch(corpus, tmp_path / "run", before=SLOW_TO_COMPILE, **own)).code == 0


@pytest.mark.slow
def test_all_processes_find_what_one_has_compiled(corpus: Path, tmp_path: Path) -> None:
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    for name in ("cold", "warm"):
        said = finished(launch(corpus, tmp_path / name, **own)).done().err
        for process in range(2):
            hits = re.findall(rf"^\[{process}\] .*cache hit for 'jit_step'", said, re.MULTILINE)
            assert bool(hits) == (name == "warm"), said
    assert hashes(tmp_path / "warm") == hashes(tmp_path / "cold")
