"""A recipe of `lmjax curate` on a cluster, by datatrove: for a corpus that one machine takes too long for.

    python -m launch curate configs/curate/books.py:FOLDER --out=DIR --tasks=200 --partition=cpu

FOLDER holds JSON lines; each task reads its share of the files. The steps that look at a document at a time are the
recipe's own functions, so that they keep and change what `lmjax curate` would; what they learn from other files, they
learn once, here, before the jobs start. Near duplicates are found by datatrove,
from the same runs of the same words: documents that agree in one of `--buckets` of `--hashes`, without the comparison
that `lmjax curate` makes of each such pair. Documents that are equal are among them, but for those of fewer words than
a run, which datatrove does not compare. What is left lies in DIR/documents, .jsonl.gz, for `lmjax prepare`, or for
`lmjax curate` with the steps that were left out, which it prints.

It submits five jobs, each waiting for the one before it, and ends; given again, it starts what has not ended well, of
the same recipe. The hosts must share FOLDER, DIR and this checkout, and have the packages of `lmjax[curate]`, datatrove
and orjson. Without `--partition` it does the work here.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from lmjax.config import ConfigFile
from lmjax.data.curate.document import Changed, Document, Dropped, Outcome
from lmjax.data.curate.duplicates import ExactDuplicates
from lmjax.data.curate.hashing import words
from lmjax.data.curate.held_out import HeldOut
from lmjax.data.curate.near_duplicates import NearDuplicates
from lmjax.data.curate.read import list_files
from lmjax.data.curate.recipe import CurateConfig, parse_step, parse_steps
from lmjax.data.curate.stage import fit, treatment
from lmjax.data.curate.step import CorpusStep, DocumentStep
from lmjax.data.prepare.sources import contents
from lmjax.errors import DONE, ConfigError
from lmjax.record import files
from lmjax.schema import validated

CLEAN, KEEP = "clean", "keep"
"""The jobs whose steps are the recipe's, and what these have learned."""

Steps = Sequence[dict[str, Any]]


class Parts(NamedTuple):
    """The steps of a recipe, by who does them."""

    before: Steps
    """Documents one at a time, before near duplicates are looked for."""
    shingle: int
    """Words in a run."""
    after: Steps
    """And afterwards."""
    rest: Steps
    """What is left for `lmjax curate`: held-out documents, and all from the first other pass on."""


def parts(steps: Steps) -> Parts:
    """Raises ConfigError for a recipe that does not look for near duplicates before its other passes."""
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    near: NearDuplicates | None = None
    for place, values in enumerate(steps):
        step = parse_step(place, values)[1]
        if isinstance(step, NearDuplicates) and near is None and not _passes(rest):
            near = step
        elif isinstance(step, ExactDuplicates) and near is None:
            continue  # they have the same words, so the same signature, if they have enough of them for one
        elif isinstance(step, HeldOut | CorpusStep) or _passes(rest):
            rest.append(values)
        else:
            (before if near is None else after).append(values)
    if near is None:
        raise ConfigError("the recipe has no near_duplicates before its other passes: one machine is enough for it")
    return Parts(before, near.shingle, after, rest)


def _passes(steps: Steps) -> bool:
    return any(isinstance(parse_step(0, values)[1], CorpusStep) for values in steps)


def treat(documents: Iterable[Any], rank: int, world_size: int, *, steps: Steps, learned: Path) -> Iterator[Any]:
    """datatrove's documents through steps of ours: a block of a pipeline. What the steps had to learn lies in `learned`
    (stage.fit), so that all tasks have learned the same."""
    functions = []
    for place, (_, step) in enumerate(parse_steps(steps)):
        assert isinstance(step, DocumentStep)
        functions.append(treatment(epath.Path(learned), place, step))
    for theirs in documents:
        document = _through(functions, Document(theirs.text, theirs.id, "", theirs.metadata))
        if document is not None:
            theirs.text, theirs.metadata = document.text, dict(document.labels)
            yield theirs


def _through(functions: Sequence[Callable[[Document], Outcome]], document: Document) -> Document | None:
    """What is left of a document."""
    for function in functions:
        outcome = function(document)
        if isinstance(outcome, Dropped):
            return None
        document = outcome.document if isinstance(outcome, Changed) else outcome
    return document


class Stage(NamedTuple):
    """A job: a pipeline, run by so many tasks, each on its share of the files."""

    name: str
    pipeline: list[Any]
    tasks: int


def stages(folder: str, text_key: str, out: Path, cut: Parts, arguments: argparse.Namespace) -> list[Stage]:
    """The jobs in order."""
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.text import TextNormConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        """Words as `near_duplicates` has them."""

        def word_tokenize(self, text: str) -> list[str]:
            return words(text)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    as_is = TextNormConfig(lowercase=False, norm_whitespace=False, remove_punctuation=False,
                           norm_unicode_diacritics=False, norm_numbers=False)  # fmt: skip
    config = MinhashConfig(n_grams=cut.shingle, num_buckets=arguments.buckets, hashes_per_bucket=arguments.hashes,
                           norm_config=as_is, hash_config=HashConfig(hash_fc="sha1"))  # fmt: skip
    cleaned, signatures, pairs, removed, kept = (
        str(out / name) for name in ("cleaned", "signatures", "pairs", "removed", "documents")
    )
    reader = JsonlReader(folder, glob_pattern="*.jsonl*", text_key=text_key, add_file_path=False)
    again = JsonlReader(cleaned, add_file_path=False)
    before, after = (
        functools.partial(treat, steps=steps, learned=out / name)
        for name, steps in ((CLEAN, cut.before), (KEEP, cut.after))
    )
    return [
        Stage(CLEAN, [reader, before, JsonlWriter(cleaned)], arguments.tasks),
        Stage("sign", [again, MinhashDedupSignature(signatures, config, language=Words())], arguments.tasks),
        Stage("pair", [MinhashDedupBuckets(signatures, pairs, config=config)], arguments.buckets),
        Stage("cluster", [MinhashDedupCluster(pairs, removed, config=config)], 1),
        Stage(KEEP, [again, MinhashDedupFilter(removed), after, JsonlWriter(kept)], arguments.tasks),
    ]


def start(wanted: Sequence[Stage], out: Path, arguments: argparse.Namespace) -> None:
    """Run the stages here, or submit them."""
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    before: Any = None
    for stage in wanted:
        logs = str(out / "logs" / stage.name)
        if arguments.partition is None:
            LocalPipelineExecutor(stage.pipeline, stage.tasks, workers=os.cpu_count() or 1, logging_dir=logs).run()
            continue
        before = SlurmPipelineExecutor(
            stage.pipeline, stage.tasks, arguments.time, arguments.partition, workers=arguments.max_running,
            mem_per_cpu_gb=arguments.gigabytes, job_name=f"{out.name}-{stage.name}", qos="", logging_dir=logs,
            depends=before, sbatch_args={"export": "ALL", "chdir": os.getcwd()},
        )  # fmt: skip
    if before is not None:
        before.run()


def begin_or_continue(out: Path, wanted: dict[str, Any]) -> None:
    """Record what the jobs do, or see that it is what those did that are there: datatrove starts none that has ended.

    Raises ConfigError where another recipe began.
    """
    path, content = out / "recipe.json", json.dumps(wanted, indent=1, sort_keys=True)
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, content)
    elif path.read_text() != content:
        raise ConfigError(
            f"--out={out} holds what another recipe, other flags or files made: {path}; use a new directory"
        )


def curate(arguments: argparse.Namespace) -> int:
    cfg = validated(CurateConfig, ConfigFile(arguments.config).tree().to_dict(), "config.")
    folders = [pattern for patterns in cfg.sources.values() for pattern in patterns]
    if len(folders) != 1 or not Path(folders[0]).is_dir():
        raise ConfigError(f"{arguments.config}: its sources must be one folder of JSON lines, not {', '.join(folders)}")
    if arguments.partition is not None and shutil.which("sbatch") is None:
        raise ConfigError(
            f"--partition={arguments.partition}: there is no sbatch here; leave it out to work without Slurm"
        )
    cut = parts(cfg.steps)
    folder, out = str(Path(folders[0]).resolve()), Path(arguments.out).resolve()
    shares = {name: getattr(arguments, name) for name in ("tasks", "buckets", "hashes")}
    try:
        jobs = stages(folder, cfg.text_key, out, cut, arguments)
        recipe = {"folder": folder, "text_key": cfg.text_key, "steps": cfg.steps} | shares
        if read := list_files(cfg).others:
            recipe["learned_from"] = contents(read)
        begin_or_continue(out, recipe)
        for name, steps in ((CLEAN, cut.before), (KEEP, cut.after)):
            fit(epath.Path(out / name), parse_steps(steps))
        start(jobs, out, arguments)
    except ImportError as error:
        raise ConfigError(f"launch curate needs datatrove and orjson ({error}): install them") from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"--partition={arguments.partition}: sbatch refused a job, as it says above") from error
    print(f"left for lmjax curate of {out}/documents: {', '.join(step['step'] for step in cut.rest) or 'nothing'}")
    return DONE
