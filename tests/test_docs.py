"""Pages that are written from the code say what the code says, and the commands of all pages run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lmjax import config
from tests.launch.fake_tools import SLURM, install

ROOT = Path(__file__).parent.parent


def test_the_page_of_settings_is_up_to_date() -> None:
    written = subprocess.run(
        [sys.executable, "docs/config_page.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert written == (ROOT / "docs" / "config.md").read_text(), "python docs/config_page.py > docs/config.md"


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "requeued"),
    [
        ("0 0", 0, 0, False),
        ("6 2 6", 0, 202, False),  # who loses another process is not the cause
        ("137 1", 0, 201, False),
        ("6 3", 0, 203, False),
        ("5 5", 0, 205, False),
        ("4 6", 0, 6, True),
        ("4", 0, 4, True),
        ("75 75", 99, 75, True),
        ("75 75", 100, 75, False),
        ("6 137", 0, 137, True),
    ],
)
def test_slurm_starts_again_what_another_start_may_mend(
    tmp_path: Path, codes: str, restarts: int, code: int, requeued: bool
) -> None:
    script = re.search(r"```sh\n(#!/bin/bash.*?)```", (ROOT / "docs" / "multi-host.md").read_text(), re.DOTALL)
    assert script
    install(tmp_path, SLURM | {"lmjax": "exit $CODE"})
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODES": codes, "SLURM_JOB_ID": "7"}
    counted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # not set at the first start
    done = subprocess.run(
        ["bash", "-c", script[1]], env=variables | counted, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "requeue 7\n" if requeued else "", "")


def test_slurms_shells_leave_sigterm_to_the_processes(tmp_path: Path) -> None:
    """They pass on the code of a process that ends in its own time."""
    line = re.search(r"^each='(.*)'$", (ROOT / "docs" / "multi-host.md").read_text(), re.MULTILINE)
    assert line
    saving = "trap 'sleep 0.2; exit 75' TERM; kill -TERM $PPID; kill -TERM $$; sleep 10"
    done = subprocess.run(["bash", "-c", line[1], "-", "bash", "-c", saving], timeout=30)
    assert done.returncode == 75


# Shell blocks -----------------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# What the page says in a comment before a block that no test runs; `.ci/run` runs the block marked `tests`.
MISSING = {
    "a checkpoint from elsewhere",
    "benchmark files",
    "a cloud",
    "a GPU",
    "an hour",
    "libtpu",
    "lmjax[curate]",
    "lmjax[eval]",
    "minutes",
    "Slurm",
    "two machines",
}
KNOWN = {"quickstart", "tests", "settings", "slow", *(f"needs: {what}" for what in MISSING)}


FENCE = re.compile(r"^(?:<!-- ([^\n]+) -->\n)?```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: Path
    line: int
    mark: str | None
    text: str


def shell_blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


BLOCKS = shell_blocks()
RUN = [block for block in BLOCKS if block.mark in (None, "quickstart", "slow")]

# Few steps, and of a long corpus a part; what the page says comes later and wins.
LMJAX = """
command=$1; shift
small=()
if [ "$command" = train ]; then
  small=(--config.train.steps=2 --config.optimizer.schedule.warmup=1 --config.train.evaluate_batches=1)
  corpus="--config.data.sources.stdlib.prepare.inputs=('my_text/*.txt',)"
  case "$*" in *configs/quickstart.py*) small+=("$corpus") ;; esac
fi
exec python -m lmjax "$command" "${small[@]}" "$@"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, as it looks to its pages, with some text of one's own; what one block makes, a later one finds."""
    place = tmp_path_factory.mktemp("clone")
    (place / "configs").symlink_to(ROOT / "configs")
    for folder in ("my_text", "bin"):
        (place / folder).mkdir()
    for source in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        (place / "my_text" / f"{source.stem}.txt").write_bytes(source.read_bytes())
    programs = {"python": f'exec "{sys.executable}" "$@"', "lmjax": LMJAX}
    for name, body in programs.items():
        (place / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (place / "bin" / name).chmod(0o755)
    return place


def in_place(text: str) -> str:
    """A block without what makes the environment, which is here."""
    text = re.sub(r"python3 -m venv \S+ && |\S*pip install [^&\n]*(?:&& |\n)", "", text)
    return text.replace(".venv/bin/", "")


def test_blocks_are_run_or_say_what_they_need() -> None:
    assert len(BLOCKS) > 10 and len(RUN) >= 4
    for block in BLOCKS:
        assert block.mark is None or block.mark in KNOWN, f"{block.page.name}:{block.line}: <!-- {block.mark} -->"
    assert {block.mark for block in BLOCKS if block.mark} == KNOWN  # no mark is left of a block that is gone


def runs(block: Block) -> Any:
    marks = [pytest.mark.slow] if block.mark == "slow" else []
    if "import torch" in block.text or ", torch" in block.text:
        marks.append(pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch"))
    return pytest.param(block, id=f"{block.page.name}:{block.line}", marks=marks)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("block", map(runs, RUN))
def test_blocks_run(block: Block, place: Path) -> None:
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", "-euo", "pipefail", "-c", in_place(block.text)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{block.text}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark == "settings"])
def test_settings_are_settings(block: Block) -> None:
    config.load(str(ROOT / "configs" / "gpt2.py"), [word.removeprefix("--config.") for word in block.text.split()])
