"""What a config would cost, before anything is trained: `lmjax train --dry-run`."""

import dataclasses
from collections.abc import Iterator

from etils import epath

from lmjax import experiment as parts
from lmjax.config import Config
from lmjax.data import manifest
from lmjax.data.shards import Dataset, open_dataset
from lmjax.errors import ConfigError
from lmjax.models.flops import sequence_flops
from lmjax.models.model import Model
from lmjax.weights import count


def describe(cfg: Config) -> Iterator[str]:
    """Lines about size, FLOPs, memory, tokens and epochs. Prepares no data and allocates nothing."""
    datasets = _open_prepared(cfg)
    cfg = _with_vocab(cfg, datasets)
    experiment = parts.assemble(cfg)
    yield from size(cfg, experiment.model)
    state = parts.abstract_state(experiment)
    devices = 1 if experiment.mesh is None else experiment.mesh.size
    state_bytes, gradients = parts.device_bytes(state), parts.device_bytes(state.params)
    yield (
        f"memory       {state_bytes / 2**20:,.1f} MiB of state and {gradients / 2**20:,.1f} MiB of gradients "
        f"on each of {devices} device(s), activations not counted"
    )
    tokens = cfg.train.steps * cfg.train.batch * cfg.data.seq_len
    total = sum(source.weight for source in cfg.data.sources.values())
    for name, dataset in datasets.items():
        if dataset is None:
            yield f"data         {name}: not prepared yet"
            continue
        available = dataset.split("train").n_tokens
        epochs = tokens * cfg.data.sources[name].weight / total / available
        yield f"data         {name}: {available:,} tokens, {epochs:.2f} epochs"


def size(cfg: Config, model: Model) -> Iterator[str]:
    """Lines about parameters, and the tokens and FLOPs of the whole run."""
    counts = count(model.spec)
    yield f"parameters   {counts.total:,} total, {counts.non_embedding:,} non-embedding, {counts.matmul:,} matmul"
    if counts.active != counts.total:
        yield f"             {counts.active:,} active: what a token passes through, the N of 6ND"
    sequences = cfg.train.steps * cfg.train.batch
    tokens, flops = sequences * cfg.data.seq_len, sequence_flops(model, cfg.data.seq_len)
    yield (
        f"tokens       {tokens:,} = {cfg.train.steps:,} steps x {cfg.train.batch} x {cfg.data.seq_len}, "
        f"{tokens / counts.total:.1f} per parameter"
    )
    yield (
        f"FLOPs        {sequences * flops.six_nd:.3g} as 6ND, {sequences * flops.causal:.3g} exact with causal "
        f"attention, {sequences * flops.full:.3g} exact with full attention"
    )


def with_known_vocab(cfg: Config) -> Config:
    """The config with its vocabulary: its own, or that of the prepared data, or of the recipe.

    Raises ConfigError when none of them tells.
    """
    return _with_vocab(cfg, _open_prepared(cfg))


def _open_prepared(cfg: Config) -> dict[str, Dataset | None]:
    return {name: _open(source.path, cfg.data.cache) for name, source in cfg.data.sources.items()}


def _open(path: str, cache: str) -> Dataset | None:
    """The data set, or None if it is not prepared yet."""
    return open_dataset(path, cache=cache) if (epath.Path(path) / manifest.FILE).exists() else None


def _with_vocab(cfg: Config, datasets: dict[str, Dataset | None]) -> Config:
    """The vocabulary of the config, of the prepared data, or of the recipe, whichever is known."""
    recipes = [source.prepare.tokenizer for source in cfg.data.sources.values() if source.prepare is not None]
    vocab = cfg.model.vocab
    for dataset in datasets.values():
        vocab = vocab or (dataset.manifest.vocab_size if dataset is not None else None)
    for recipe in recipes:
        vocab = vocab or (recipe.vocab if recipe.kind in ("bpe", "unigram") else None)
    if vocab is None:
        raise ConfigError("the vocabulary is not known before the data is prepared; set model.vocab")
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab=vocab))
