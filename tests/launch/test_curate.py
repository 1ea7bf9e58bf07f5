"""A recipe on a cluster: the recipe's own functions, and, where datatrove is installed, the same documents."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from launch.curate import begin_or_continue, parts, treat
from lmjax.data.config import PrepareConfig
from lmjax.data.curate.curate import curate
from lmjax.data.curate.recipe import CurateConfig, parse_steps
from lmjax.data.curate.stage import fit
from lmjax.data.prepare.sources import list_inputs, read_records
from lmjax.errors import ConfigError

ROOT = Path(__file__).parents[2]
STEPS: tuple[dict[str, Any], ...] = (
    {"step": "normalize"},
    {"step": "gopher", "least_words": 40, "least_stop_words": 0},
    {"step": "exact_duplicates"},
    {"step": "near_duplicates"},
    {"step": "privacy"},
)


@dataclasses.dataclass
class Theirs:
    """As much of datatrove's document as `treat` needs."""

    text: str
    id: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def texts() -> list[str]:
    """60 documents, ten copies of them in capitals, ten with a word of 200 replaced, two that are too short."""
    rng = np.random.default_rng(0)
    documents = [[f"w{word}" for word in rng.integers(0, 5000, 200)] for _ in range(60)]
    changed = [[*words[:100], "another", *words[101:]] for words in documents[:10]]
    copies = [" ".join(words).upper() for words in documents[10:20]]
    kept = [" ".join(words) + f"  \nWrite to me{n}@example.org" for n, words in enumerate([*documents, *changed])]
    return [*kept, *copies, "too short", "too short, too"]


def test_documents_become_what_the_recipe_makes_of_them(tmp_path: Path) -> None:
    """In any number of tasks: what a step learns is learned once, from files that are read no more."""
    for name, first in (("good", "w"), ("bad", "v")):
        lines = (json.dumps({"text": text.replace("w", first)}) + "\n" for text in texts()[:30])
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    quality = {"step": "quality", "good": (f"{tmp_path}/good.jsonl",), "bad": (f"{tmp_path}/bad.jsonl",)}
    steps = ({"step": "normalize"}, {"step": "privacy"}, {"step": "gopher", "least_stop_words": 0}, quality)
    given = [text.replace("w", "v") if number % 5 == 0 else text for number, text in enumerate(texts())]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in given))
    cfg = CurateConfig(sources={"s": (str(tmp_path / "in.jsonl"),)}, steps=steps, workers=1)
    curate(cfg, tmp_path / "out", progress=False)

    learned = tmp_path / "learned"
    fit(epath.Path(learned), parse_steps(steps))
    for name in ("good", "bad"):
        (tmp_path / f"{name}.jsonl").unlink()
    documents = [Theirs(text, str(number)) for number, text in enumerate(given)]
    tasks = (treat(documents[task::2], task, 2, steps=steps, learned=learned) for task in range(2))
    made = [one.text for task in tasks for one in task]
    assert 40 < len(made) < 70 and sorted(made) == sorted(texts_of(f"{tmp_path}/out/*.jsonl.zst"))


def texts_of(pattern: str) -> list[str]:
    return [record["text"] for record in read_records(list_inputs((pattern,)), PrepareConfig())]


def test_who_does_which_steps() -> None:
    names = ("repair", "held_out", "gopher", "exact_duplicates", "near_duplicates", "privacy", "repeated_parts", "c4")
    before, shingle, after, rest = parts([{"step": name} for name in names])
    assert shingle == 5
    assert [[step["step"] for step in steps] for steps in (before, after, rest)] == [
        ["repair", "gopher"], ["privacy"], ["held_out", "repeated_parts", "c4"]
    ]  # fmt: skip
    for steps in (({"step": "gopher"},), ({"step": "repeated_parts"}, {"step": "near_duplicates"})):
        with pytest.raises(ConfigError, match="no near_duplicates before its other passes"):
            parts(steps)


def test_jobs_that_have_ended_are_never_taken_for_those_of_another_recipe(tmp_path: Path) -> None:
    wanted = {"steps": ({"step": "c4", "words": ("a", "b")},), "tasks": 2}
    begin_or_continue(tmp_path / "out", wanted)
    begin_or_continue(tmp_path / "out", wanted)
    with pytest.raises(ConfigError, match=r"what another recipe, other flags or files made: .*recipe\.json; use a new"):
        begin_or_continue(tmp_path / "out", wanted | {"tasks": 3})


@pytest.mark.parametrize("partition", [None, pytest.param("debug", marks=pytest.mark.slow)])
def test_the_same_documents_are_kept(tmp_path: Path, partition: str | None) -> None:
    """Here, and on the cluster that SLURM_CONF names: tests/launch/slurm_up.sh makes one."""
    for package in ("datatrove", "orjson", "rensa"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if partition and "SLURM_CONF" not in os.environ:
        pytest.skip("needs a Slurm cluster")
    (tmp_path / "in").mkdir()
    for share in range(2):
        lines = (json.dumps({"content": text}) + "\n" for text in texts()[share::2])
        (tmp_path / "in" / f"{share}.jsonl").write_text("".join(lines))
    recipe = {"sources": {"s": [f"{tmp_path}/in"]}, "steps": STEPS, "text_key": "content"}
    (tmp_path / "recipe.py").write_text(
        f"from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({recipe})"
    )
    command = [
        sys.executable,
        "-m",
        "launch",
        "curate",
        f"{tmp_path}/recipe.py",
        f"--out={tmp_path}/theirs",
        "--tasks=2",
    ]
    subprocess.run([*command, *([f"--partition={partition}"] if partition else [])], cwd=ROOT, check=True)
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("theirs/logs/keep/completions/*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    cfg = CurateConfig(sources={"s": (f"{tmp_path}/in",)}, steps=STEPS, text_key="content", workers=1)
    curate(cfg, tmp_path / "ours", progress=False)
    ours = sorted(texts_of(f"{tmp_path}/ours/*.jsonl.zst"))
    assert len(ours) == 60 and ours == sorted(texts_of(f"{tmp_path}/theirs/documents/*.jsonl.gz"))
