"""Instruction tuning: the loss of the next token, of what the assistant writes in prepared conversations.

The data say which tokens those are (data/chat/), rows hold whole conversations (data/packing.py), and all else is as in
pretraining: the same objective, whose weights are theirs, and the same validation, whose loss is that of responses.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from etils import epath

from lmjax.config import Config
from lmjax.data.batch import Batch
from lmjax.data.chat.rendering import Renderer
from lmjax.data.chat.templates import FILE, Template, load_template, save_template
from lmjax.data.store.dataset import Dataset
from lmjax.data.store.shards import TOKENIZER
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import CheckpointError, ConfigError, DataError
from lmjax.metrics import Metrics
from lmjax.optim.schedules import Hyper
from lmjax.tasks import pretrain
from lmjax.tasks.task import Language, Task
from lmjax.train.config import SampleConfig
from lmjax.train.objective import Keys, Objective
from lmjax.weights import Params


def instruct(cfg: Config) -> Task:
    """The task of a config, its data prepared where they are not yet.

    Raises what `pretrain` does, DataError for data that are no conversations or were written by different templates,
    and ConfigError for prompts that make no sample.
    """
    _check(cfg)
    data = pretrain.open_data(cfg)
    origin = _shared_template(cfg, data.datasets) / TOKENIZER
    template, sample = load_template(origin), cfg.train.sample
    asked, end = _read_prompts(template, data.tokenizer, sample)
    stops = data.tokenizer.stop_ids or (data.tokenizer.endoftext_id,)
    if end is not None and end not in stops:
        data.tokenizer.stop_ids = (*stops, end)
    task = pretrain.on_data(cfg, data)
    assert task.language is not None
    scored = {
        name: {split: content.scored_tokens for split, content in dataset.manifest.splits.items()}
        for name, dataset in data.datasets.items()
    }
    return task._replace(
        objective=_with_share(task.objective),
        sample=functools.partial(sample_answers, task.language, data.tokenizer, sample, asked) if asked else None,
        write_files=functools.partial(_write_files, data.tokenizer, template, origin),
        about={**task.about, "scored": scored, "template": template.hash},
    )


def without_data(cfg: Config) -> Task:
    """The task as far as it is known without data. Raises ConfigError for documents that share rows otherwise."""
    _check(cfg)
    task = pretrain.without_data(cfg)
    return task._replace(objective=_with_share(task.objective))


def has_files(workdir: epath.Path) -> bool:
    """Whether the tokenizer of a work directory and its template are there and undamaged."""
    return pretrain.has_tokenizer(workdir) and (workdir / TOKENIZER / FILE).exists()


def _check(cfg: Config) -> None:
    if cfg.data.documents != "whole":
        raise ConfigError(
            f"task=instruct reads conversations whole: set data.documents=whole, not {cfg.data.documents}"
        )


def _shared_template(cfg: Config, datasets: Mapping[str, Dataset]) -> epath.Path:
    """The directory of a data set with the template of all."""
    (first_name, first), *others = datasets.items()
    for name, dataset in datasets.items():
        if dataset.manifest.template_hash is None:
            raise DataError(
                f"data.sources.{name}: {cfg.data.sources[name].path} holds texts, not conversations; give its recipe "
                "prepare.chat (lmjax prepare: --chat), or train on it with task=pretrain"
            )
    for name, dataset in others:
        if dataset.manifest.template_hash != first.manifest.template_hash:
            raise DataError(
                f"data.sources.{name} and data.sources.{first_name} were written by different chat templates; prepare "
                "both with the same one"
            )
    return first.path


def _with_share(objective: Objective) -> Objective:
    """The objective, with one more metric: `scored`, the share of the places in a batch whose target is scored."""

    def loss(params: Params, frozen: Params, batch: Batch, keys_B: Keys, hyper: Hyper) -> tuple[Any, Metrics]:
        minimized, metrics = objective.loss(params, frozen, batch, keys_B, hyper)
        scored_BT = batch.weights_BT > 0
        return minimized, {**metrics, "scored": (scored_BT.sum(dtype=jnp.float32), jnp.float32(scored_BT.size))}

    return objective._replace(loss=loss)


# Samples and files ------------------------------------------------------------------------------------------------


def _read_prompts(template: Template, tokenizer: Tokenizer, cfg: SampleConfig) -> tuple[list[list[int]], int | None]:
    """The sample's prompts as the model reads them, and the symbol that ends an answer, if that is a symbol.

    Raises ConfigError for prompts and settings that no sample can be made with.
    """
    pretrain.sample_settings(cfg)
    if not all(prompt.strip() for prompt in cfg.prompts):
        raise ConfigError("train.sample.prompts: an empty one asks for nothing; give questions, or no prompts: ()")
    with Renderer(template, clock=False) as renderer:
        try:
            texts = [
                renderer.render([{"role": "user", "content": prompt}], add_generation_prompt=True).text
                for prompt in cfg.prompts
            ]
            asked = [tokenizer.encode_symbols(text) for text in texts]
        except DataError as error:
            raise ConfigError(f"train.sample.prompts: {error}; change them, or set no prompts: ()") from None
        return asked, _end_symbol(renderer, tokenizer)


def _end_symbol(renderer: Renderer, tokenizer: Tokenizer) -> int | None:
    """The symbol that the template writes after an answer; None where it writes none, or words."""
    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        _, found, end = renderer.render(turns).text.rpartition(answer)
    except DataError:  # it asks for more than these turns
        return None
    symbols, spelled = tokenizer.encode_symbols(end), tokenizer.encode(end)
    return symbols[0] if found and symbols and symbols[0] != spelled[0] else None


def sample_answers(
    language: Language,
    tokenizer: Tokenizer,
    cfg: SampleConfig,
    asked: Sequence[Sequence[int]],
    params: Params,
    frozen: Params,
) -> str:
    """Every prompt with the answer to it, which the model gives to what the template makes of the prompt."""
    answers = pretrain.continuations(language, tokenizer, cfg, asked, params, frozen)
    return "\n\n".join(f"{prompt}\n{answer}" for prompt, answer in zip(cfg.prompts, answers, strict=True))


def _write_files(tokenizer: Tokenizer, template: Template, origin: epath.Path, workdir: epath.Path) -> None:
    """The tokenizer and the template, by which `lmjax generate --chat` reads prompts as this run did."""
    pretrain.save_tokenizer(tokenizer, workdir)
    try:
        save_template(template, origin, workdir / TOKENIZER)
    except DataError as error:
        raise CheckpointError(f"storage: {error}; free or mend it and run again") from error
