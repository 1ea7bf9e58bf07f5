"""Pretraining: the loss of the next token over prepared text."""

from typing import NamedTuple

from lmjax.config import Config
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.dataset import Dataset, check_same_tokenizer, open_dataset
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.errors import ConfigError, DataError
from lmjax.evaluate.baselines import check_compressible
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate
from lmjax.generate.slide import generate_past
from lmjax.models.model import Model
from lmjax.process import group
from lmjax.schema import validated
from lmjax.train.config import SampleConfig
from lmjax.weights import Params, by_path


class Data(NamedTuple):
    datasets: dict[str, Dataset]
    tokenizer: Tokenizer


def open_data(cfg: Config) -> Data:
    """The data sets of a config and their one tokenizer. Prepares those that have a recipe and do not exist yet.

    Raises DataError for data that is missing, damaged, or made with different tokenizers.
    """
    if not cfg.data.sources:
        raise ConfigError("data.sources is empty; name a prepared data set, e.g. --config=configs/quickstart.py")
    with group.leader_first("preparing the data", group.PATIENCE_SECONDS):
        for source in cfg.data.sources.values():
            if source.prepare is not None:
                prepare(source.prepare, source.path)
    datasets = {name: open_dataset(source.path, cache=cfg.data.cache) for name, source in cfg.data.sources.items()}
    first, dataset = next(iter(datasets.items()))
    tokenizer = dataset.tokenizer()
    check_same_tokenizer(
        datasets,
        tokenizer.hash,
        lambda name: f"data sources '{first}' and '{name}' were prepared with different tokenizers",
    )
    if cfg.train.compression_baseline:
        check_compressible(datasets)
    return Data(datasets, tokenizer)


def check_sample(cfg: SampleConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError for prompts and settings that no sample can be made with: before the first step."""
    _sample_settings(cfg)
    for prompt in cfg.prompts:
        try:
            tokenizer.encode(prompt)
        except DataError as error:
            raise ConfigError(f"train.sample.prompts: {prompt!r}: {error}; change it, or set no prompts: ()") from None


def sample_text(model: Model, params: Params, tokenizer: Tokenizer, cfg: SampleConfig) -> str:
    """A text for every prompt, generated on the one device that the weights are on.

    It may be longer than a learned table of positions: see generate/slide.py.
    """
    tables = [weight.shape[0] for weight in by_path(model.spec).values() if weight.in_axes == ("context",)]
    settings = _sample_settings(cfg)
    if tables:
        texts = generate_past(model, params, tokenizer, cfg.prompts, settings, context=min(tables))
    else:
        texts = [one.text for one in generate(model, params, tokenizer, cfg.prompts, settings)]
    return "\n\n".join(prompt + text for prompt, text in zip(cfg.prompts, texts, strict=True))


def _sample_settings(cfg: SampleConfig) -> GenerateConfig:
    return validated(GenerateConfig, {"tokens": cfg.tokens, "temperature": cfg.temperature}, "train.sample.")
