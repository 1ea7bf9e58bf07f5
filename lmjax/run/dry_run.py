"""What a config would cost, before anything is trained: `lmjax train --dry-run`."""

import dataclasses
from collections.abc import Iterator

from lmjax.config import Config
from lmjax.data.mixture import MIXTURES
from lmjax.data.packing import PackedRows
from lmjax.data.store import manifest
from lmjax.data.store.dataset import Dataset
from lmjax.data.store.manifest import Manifest
from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.errors import ConfigError
from lmjax.record import files
from lmjax.registry import without_data
from lmjax.run import assemble, branch
from lmjax.tasks.task import Task
from lmjax.train.accounting import Cost
from lmjax.weights import count

Manifests = dict[str, Manifest | None]
"""The manifests of a config's data sets, by name; None for one that is not prepared yet."""


def describe(cfg: Config) -> Iterator[str]:
    """Lines about size, FLOPs, memory, attention, tokens and epochs. Prepares and stages no data, allocates nothing."""
    manifests = read_manifests(cfg)
    cfg = with_vocab(cfg, manifests)
    task = without_data(cfg)
    task.start.check()
    if task.frozen is not None:
        task.frozen.start.check()
    if cfg.train.branch_from is not None:
        branch.check(cfg)
    experiment = assemble.assemble(task)
    yield from size(task)
    state = assemble.abstract_state(experiment)
    devices = 1 if experiment.mesh is None else experiment.mesh.size
    held = {"state": state, "gradients": state.params, "frozen weights": assemble.abstract_frozen(experiment)}
    sizes = [f"{assemble.device_bytes(x) / 2**20:,.1f} MiB of {name}" for name, x in held.items() if x]
    yield (
        f"memory       {', '.join(sizes[:-1])} and {sizes[-1]} on each of {devices} device(s), activations not counted"
    )
    if attends := assemble.attends(experiment):
        yield f"attention    {attends}, on this machine"
    counted = epochs(cfg, manifests)
    for name, found in manifests.items():
        if found is None:
            yield f"data         {name}: not prepared yet"
        else:
            known = "epochs not known yet" if counted[name] is None else f"{counted[name]:.2f} epochs"
            most = "at most " if cfg.data.documents == "whole" and not _is_here(cfg, name) else ""
            yield f"data         {name}: {found.splits['train'].tokens:,} tokens, {most}{known}"


def epochs(cfg: Config, manifests: Manifests) -> dict[str, float | None]:
    """How often a run reads each of its data sets; None where what is not prepared yet leaves it open.

    Whole documents leave places of their rows empty. How many rows they fill follows from their lengths, which are read
    where the data set is local; in a bucket rows are taken to be full, so that it is read less often than is said.
    """
    sizes = [
        0 if found is None else cfg.data.sources[name].tokens or found.splits["train"].tokens
        for name, found in manifests.items()
    ]
    weights = MIXTURES[cfg.data.mixture]([source.weight for source in cfg.data.sources.values()], sizes)
    known = all(sizes) or cfg.data.mixture == "by_weight"
    rows, counted = cfg.train.steps * cfg.train.batch, dict[str, float | None]()
    for (name, found), size, weight in zip(manifests.items(), sizes, weights, strict=True):
        counted[name] = None
        if found is not None and known:
            counted[name] = rows * weight / sum(weights) / _rows_per_epoch(cfg, name, found, size)
    return counted


def _rows_per_epoch(cfg: Config, name: str, found: Manifest, tokens: int) -> float:
    if cfg.data.documents != "whole":
        return tokens / cfg.data.seq_len
    if not _is_here(cfg, name):
        return tokens / (cfg.data.seq_len + 1)
    source = cfg.data.sources[name]
    split = Dataset(files.locate(source.path), found).split("train")
    return PackedRows(split, cfg.data.seq_len, limit=source.tokens).n_rows


def _is_here(cfg: Config, name: str) -> bool:
    return not files.is_remote(files.locate(cfg.data.sources[name].path))


def size(task: Task) -> Iterator[str]:
    """Lines about parameters, and the tokens and FLOPs of the whole run."""
    cfg, counts = task.cfg, count(task.spec)
    yield f"parameters   {counts.total:,} total, {counts.non_embedding:,} non-embedding, {counts.matmul:,} matmul"
    if counts.active != counts.total:
        yield f"             {counts.active:,} active: what a token passes through, the N of 6ND"
    if task.frozen is not None:
        whole = counts.total + count(task.frozen.spec).total
        yield f"             these are trained: {counts.total / whole:.2%} of {whole:,}, the others are frozen"
    run = Cost(0, 0, 0, 0, 0).plus(cfg.train.steps * cfg.train.batch, task.cost)
    yield (
        f"tokens       {run.tokens:,} = {cfg.train.steps:,} steps x {cfg.train.batch} x {cfg.data.seq_len}, "
        f"{run.tokens / counts.total:.1f} per parameter"
    )
    yield (
        f"FLOPs        {run.flops_6nd:.3g} as 6ND, {run.flops_causal:.3g} exact with causal "
        f"attention, {run.flops_full:.3g} exact with full attention"
    )


def with_known_vocab(cfg: Config) -> Config:
    """The config with its vocabulary: its own, or else that of the prepared data, or of the recipe.

    Raises ConfigError when none of them tells, and DataError for a place that cannot be read.
    """
    return cfg if cfg.model.vocab is not None else with_vocab(cfg, read_manifests(cfg))


def read_manifests(cfg: Config) -> Manifests:
    return {name: _manifest(source.path) for name, source in cfg.data.sources.items()}


def _manifest(path: str) -> Manifest | None:
    """The manifest of a data set, of which nothing else is read; None if it is not prepared yet."""
    directory = files.locate(path)
    with files.reporting(directory):
        prepared = (directory / manifest.FILE).exists()
    return manifest.read_manifest(directory) if prepared else None


def with_vocab(cfg: Config, manifests: Manifests) -> Config:
    """The config with its vocabulary: its own, that of the prepared data, or of the recipe, whichever is known first.

    Raises ConfigError when none of them tells.
    """
    recipes = [source.prepare.tokenizer for source in cfg.data.sources.values() if source.prepare is not None]
    vocab = cfg.model.vocab
    for found in manifests.values():
        vocab = vocab or (found.vocab_size if found is not None else None)
    for recipe in recipes:
        vocab = vocab or (recipe.vocab if recipe.learns else None)
        vocab = vocab or (ByteTokenizer.vocab_size if recipe.kind == "bytes" else None)
    if vocab is None:
        raise ConfigError("the vocabulary is not known before the data is prepared; set model.vocab")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab=vocab))
