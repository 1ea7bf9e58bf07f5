"""Pretraining: the loss of the next token over prepared text."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lmjax.config import Config
from lmjax.data.loader import Loader
from lmjax.data.packing import PackedRows
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.dataset import Dataset, open_sources
from lmjax.data.tokenizers.load import saved_hash
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.data.windows import as_batch
from lmjax.errors import CheckpointError, ConfigError, DataError
from lmjax.evaluate.baselines import check_compressible, compression_baselines
from lmjax.evaluate.splits import evaluate_split, evaluation_metrics, float32
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate
from lmjax.generate.slide import generate_past
from lmjax.models import architectures
from lmjax.models.flops import sequence_flops
from lmjax.models.front import places
from lmjax.process import group
from lmjax.schema import validated
from lmjax.tasks.start import drawn, pinned, read_from
from lmjax.tasks.task import Evaluate, Language, Task
from lmjax.train.accounting import Cost
from lmjax.train.config import SampleConfig
from lmjax.train.objective import language_model
from lmjax.weights import Params, by_path


def pretrain(cfg: Config) -> Task:
    """The task of a config, its data prepared where they are not yet, its vocabulary filled in.

    Raises DataError for data that is missing, damaged, or made with different tokenizers; ConfigError for settings that
    do not fit the tokenizer.
    """
    data = open_data(cfg)
    check_sample(cfg.train.sample, data.tokenizer)
    return on_data(cfg, data)


def on_data(cfg: Config, data: "Data") -> Task:
    """The task of a config on data that are open, its vocabulary and the weights to start from filled in.

    Raises ConfigError where they do not fit the tokenizer.
    """
    if cfg.train.distill is not None and cfg.task != "distill":
        raise ConfigError(f"train.distill is of task=distill, not {cfg.task}; set that task, or leave it out: None")
    cfg = with_tokenizer_vocab(cfg, data.tokenizer)
    if cfg.train.init_from is not None:
        init_from = group.broadcast("the weights to start from", pinned(cfg.train.init_from))
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, init_from=init_from))
    return with_data(without_data(cfg, data.tokenizer.hash), data)


def without_data(cfg: Config, tokenizer_hash: str | None = None) -> Task:
    """The task as far as it is known without data: enough to compile it, to plan, and to train on batches at hand.

    What the weights come from must have the tokenizer of this hash, if it is given.
    """
    model, init_from = architectures.build(cfg.model, microbatches=cfg.train.microbatches), cfg.train.init_from
    rows_BU = np.zeros((cfg.train.batch, cfg.data.seq_len + 1), np.int32)  # of which only shape and type count
    flops = sequence_flops(model, cfg.data.seq_len)
    return Task(
        cfg=cfg,
        spec=model.spec,
        start=drawn(model.start) if init_from is None else read_from(init_from, cfg.model, model.spec, tokenizer_hash),
        objective=language_model(model, cfg.train.loss),
        batch=as_batch(rows_BU, rows_BU, np.arange(cfg.train.batch), cfg.data.documents),
        cost=Cost(1, cfg.data.seq_len, flops.six_nd, flops.causal, flops.full),
        language=Language(architectures.build(cfg.model), float32(cfg.model)),
    )


def with_data(task: Task, data: "Data") -> Task:
    """The task reading and scoring text."""
    assert task.language is not None
    cfg, language = task.cfg, task.language
    sets = {
        name: dataset.split("valid") for name, dataset in data.datasets.items() if "valid" in dataset.manifest.splits
    }
    if cfg.data.documents == "whole":
        for split in sets.values():
            PackedRows(split, cfg.data.seq_len)  # what does not fit is said now, not when it is evaluated
    evaluations = {"validation": validation(cfg, language, sets)}
    if cfg.train.evaluations is not None:
        from lmjax.tasks.benchmarks import benchmarks  # with all tasks, which few runs have

        evaluations["benchmarks"] = benchmarks(cfg, language, data.tokenizer)
    return task._replace(
        source=functools.partial(Loader, cfg.data, batch_size=cfg.train.batch),
        evaluations=evaluations,
        sample=functools.partial(sample_text, language, data.tokenizer, cfg.train.sample)
        if cfg.train.sample.prompts
        else None,
        baselines=functools.partial(compression_baselines, data.datasets, data.tokenizer)
        if cfg.train.compression_baseline
        else dict,
        write_files=functools.partial(save_tokenizer, data.tokenizer),
        about={
            "data": {name: dataset.manifest.fingerprint for name, dataset in data.datasets.items()},
            "validation": {name: split.digest for name, split in sets.items()},
        },
    )


def save_tokenizer(tokenizer: Tokenizer, workdir: epath.Path) -> None:
    """Into a work directory. Raises CheckpointError: it is not the data that are at fault."""
    try:
        tokenizer.save(workdir / "tokenizer")
    except DataError as error:
        raise CheckpointError(f"storage: {error}; free or mend it and run again") from error


def has_tokenizer(workdir: epath.Path) -> bool:
    """Whether the tokenizer of a work directory is there and undamaged."""
    try:
        return bool(saved_hash(workdir / "tokenizer"))
    except DataError:
        return False


# Data -------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    datasets: dict[str, Dataset]
    tokenizer: Tokenizer


def open_data(cfg: Config) -> Data:
    """The data sets of a config and their one tokenizer. Prepares those that have a recipe and do not exist yet.

    Raises what `open_sources` and `prepare` do.
    """
    with group.leader_first("preparing the data", group.PATIENCE_SECONDS):
        for source in cfg.data.sources.values():
            if source.prepare is not None:
                prepare(source.prepare, source.path)
    datasets = open_sources(cfg.data)
    tokenizer = next(iter(datasets.values())).tokenizer()
    if cfg.train.compression_baseline:
        check_compressible(datasets)
    return Data(datasets, tokenizer)


def with_tokenizer_vocab(cfg: Config, tokenizer: Tokenizer) -> Config:
    """The config with model.vocab filled in. Raises ConfigError when the model has too few rows for the tokens."""
    if cfg.model.vocab is not None and cfg.model.vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab={cfg.model.vocab} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it unset"
        )
    vocab = cfg.model.vocab or tokenizer.vocab_size
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab=vocab))


# Evaluation -------------------------------------------------------------------------------------------------------


def validation(cfg: Config, language: Language, sets: Mapping[str, Any]) -> Evaluate:
    """Score the same batches of every set each time, as `val/`; at the end also the whole sets, as `val_full/`."""
    size, limit = cfg.train.evaluate_batch or cfg.train.batch, cfg.train.evaluate_batches

    def evaluate(
        params: Params,
        frozen: Params,
        *,
        step: int,
        mesh: jax.sharding.Mesh | None,
        last: bool,
        on_batch: Callable[[str], None],
    ) -> dict[str, Any]:
        def score(limit: int | None) -> dict[str, Any]:
            return {
                name: evaluate_split(
                    language.scorer,
                    language.weights(frozen, params),
                    split,
                    cfg.data,
                    batch=size,
                    limit=limit,
                    mesh=mesh,
                    on_batch=functools.partial(on_batch, name),
                )
                for name, split in sets.items()
            }

        results = score(limit)
        metrics: dict[str, Any] = evaluation_metrics(results)
        metrics |= {f"data/{name}/valid_digest": result.digest for name, result in results.items()}
        if last:
            metrics |= evaluation_metrics(results if limit is None else score(None), "val_full")
        return metrics

    return evaluate


# Samples ----------------------------------------------------------------------------------------------------------


def check_sample(cfg: SampleConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError for prompts and settings that no sample can be made with: before the first step."""
    sample_settings(cfg)
    for prompt in cfg.prompts:
        try:
            tokenizer.encode(prompt)
        except DataError as error:
            raise ConfigError(f"train.sample.prompts: {prompt!r}: {error}; change it, or set no prompts: ()") from None


def sample_text(language: Language, tokenizer: Tokenizer, cfg: SampleConfig, params: Params, frozen: Params) -> str:
    """A text for every prompt."""
    texts = continuations(language, tokenizer, cfg, cfg.prompts, params, frozen)
    return "\n\n".join(prompt + text for prompt, text in zip(cfg.prompts, texts, strict=True))


def continuations(
    language: Language,
    tokenizer: Tokenizer,
    cfg: SampleConfig,
    prompts: Sequence[str | Sequence[int]],
    params: Params,
    frozen: Params,
) -> list[str]:
    """What follows each prompt, a text or ids, generated on the one device that the weights are on.

    It may be longer than a learned table of positions: see generate/slide.py.
    """
    model, weights = language.model, language.weights(frozen, params)
    tables = [weight.shape[0] for weight in by_path(model.spec).values() if weight.in_axes == ("context",)]
    settings = sample_settings(cfg)
    if tables:
        return generate_past(model, weights, tokenizer, prompts, settings, context=min(tables) - places(weights))
    return [one.text for one in generate(model, weights, tokenizer, prompts, settings)]


def sample_settings(cfg: SampleConfig) -> GenerateConfig:
    """Raises ConfigError for settings that no text can be made with."""
    return validated(GenerateConfig, {"tokens": cfg.tokens, "temperature": cfg.temperature}, "train.sample.")
