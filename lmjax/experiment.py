"""From a config to the parts of a run: data, model, optimizer, mesh, state."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath

from lmjax import checkpoint, distributed, layout
from lmjax.config import Config, from_json
from lmjax.data.batch import Batch
from lmjax.data.config import DataConfig
from lmjax.data.prepare import prepare
from lmjax.data.shards import Dataset, TokenSplit, open_dataset
from lmjax.data.tokenizer import Tokenizer, load_tokenizer
from lmjax.data.windows import as_batch, document_batches, evaluation_batches
from lmjax.errors import ConfigError, DataError
from lmjax.evaluate import compression
from lmjax.evaluate.likelihood import Evaluation, evaluate, macro_average
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate
from lmjax.generate.slide import generate_past
from lmjax.models import decoder
from lmjax.models.config import ModelConfig, dominant, require_learning
from lmjax.models.model import Model
from lmjax.optim.config import hyper
from lmjax.optim.optimizers import Optimizer, build, state_shardings
from lmjax.schema import validated
from lmjax.train.config import SampleConfig
from lmjax.train.objective import Objective, language_model
from lmjax.train.state import TrainState, zero_counters
from lmjax.train.step import Step, make_step
from lmjax.weights import Params, abstract, by_path, count, initialize

logger = logging.getLogger(__name__)

_MOST_PARAMETERS = 1 << 44  # 16 bytes of state for each are 256 TiB


class Experiment(NamedTuple):
    """A config with its vocabulary filled in, and what follows from it."""

    cfg: Config
    model: Model
    objective: Objective
    optimizer: Optimizer
    mesh: jax.sharding.Mesh | None
    """None on a single device: then nothing is sharded and nothing needs to know."""


def assemble(cfg: Config, devices: list[Any] | None = None) -> Experiment:
    """The parts of a run, on every device or on `devices`. Raises ConfigError for parts that do not fit together."""
    require_learning(cfg.model)
    model = decoder.build(cfg.model, microbatches=cfg.train.microbatches)
    if (parameters := count(model.spec).total) > _MOST_PARAMETERS:
        raise ConfigError(f"the model would have {parameters:,} parameters, more than can be held; make it smaller")
    return Experiment(
        cfg=cfg,
        model=model,
        objective=language_model(model, cfg.train.loss),
        optimizer=build(cfg.optimizer, model.spec),
        mesh=make_mesh(cfg, devices),
    )


# Data -------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    datasets: dict[str, Dataset]
    tokenizer: Tokenizer


def open_data(cfg: Config) -> Data:
    """The data sets of a config and their one tokenizer. Prepares those that have a recipe and do not exist yet.

    Raises DataError for data that is missing, damaged, or made with different tokenizers.
    """
    if not cfg.data.sources:
        raise ConfigError("data.sources is empty; name a prepared data set, e.g. --config=configs/quickstart.py")
    with distributed.leader_first("preparing the data", distributed.PATIENCE_SECONDS):
        for source in cfg.data.sources.values():
            if source.prepare is not None:
                prepare(source.prepare, source.path)
    datasets = {name: open_dataset(source.path, cache=cfg.data.cache) for name, source in cfg.data.sources.items()}
    (first, dataset), *others = datasets.items()
    tokenizer = dataset.tokenizer()
    for name, other in others:
        if other.manifest.tokenizer_hash != tokenizer.hash:
            raise DataError(f"data sources '{first}' and '{name}' were prepared with different tokenizers")
    if cfg.train.compression_baseline:
        _check_compressible(datasets)
    return Data(datasets, tokenizer)


def _check_compressible(datasets: Mapping[str, Dataset]) -> None:
    """Raises DataError now, rather than after training, for validation text that is too long for xz."""
    most = compression.LARGEST - _PRIMING_BYTES
    for name, dataset in datasets.items():
        valid = dataset.manifest.splits.get("valid")
        if valid is not None and valid.text_bytes > most:
            raise DataError(
                f"the validation text of data source '{name}' has {valid.text_bytes:,} bytes, more than the {most:,} "
                "that xz can be given; set train.compression_baseline=False"
            )


def with_vocab(cfg: Config, tokenizer: Tokenizer) -> Config:
    """The config with model.vocab filled in. Raises ConfigError when the model has too few rows for the tokens."""
    if cfg.model.vocab is not None and cfg.model.vocab < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab={cfg.model.vocab} is smaller than the tokenizer's {tokenizer.vocab_size}; leave it unset"
        )
    vocab = cfg.model.vocab or tokenizer.vocab_size
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab=vocab))


# Devices ----------------------------------------------------------------------------------------------------------


def make_mesh(cfg: Config, devices: list[Any] | None = None) -> jax.sharding.Mesh | None:
    """The mesh, or None for the one device there is. Raises ConfigError when it does not divide the batches.

    `devices` may be of a machine that is not here: a mesh is then the only thing that names them, even if it is one.
    """
    mesh = layout.make_mesh(cfg.mesh, devices)
    if distributed.processes() > 1 and mesh.size != jax.device_count():
        raise ConfigError(
            f"the mesh takes {mesh.size} of {jax.device_count()} devices in {distributed.processes()} processes: none "
            "may be left out; leave one mesh axis unset, or start fewer processes"
        )
    if mesh.size == 1 and devices is None:
        return None
    check_stages(mesh, cfg)
    pieces = cfg.train.batch // cfg.train.microbatches
    layout.check_divides("microbatch", pieces, mesh, setting="train.batch / train.microbatches")
    layout.check_batch(mesh, rows=cfg.train.batch, setting="train.batch", T=cfg.data.seq_len)
    if cfg.train.evaluate_batch is not None:
        layout.check_batch(mesh, rows=cfg.train.evaluate_batch, setting="train.evaluate_batch", T=cfg.data.seq_len)
    return mesh


def check_stages(mesh: jax.sharding.Mesh, cfg: Config) -> None:
    """Raise ConfigError unless the pipeline's stages divide the layers that they share, and the microbatches."""
    period, repeats = cfg.model.segments[dominant(cfg.model.segments)]
    layers = cfg.model.layers
    what = "model.layers" if repeats == layers else f"the periods of {len(period)} layers in model.layers={layers}"
    layout.check_divides("layers", repeats, mesh, setting=what)
    layout.check_divides("layers", cfg.train.microbatches, mesh, setting="train.microbatches")


def entered(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def jitted_step(experiment: Experiment) -> Any:
    """The train step, its state donated, its outputs pinned to the shardings of its inputs; call it in the mesh."""
    return jax.jit(
        make_step(experiment.objective, experiment.optimizer, microbatches=experiment.cfg.train.microbatches),
        donate_argnums=0,
        out_shardings=(shardings(experiment), None),
    )


def compiled_step(experiment: Experiment) -> Step:
    """The train step, compiled when it is first called."""
    step = jitted_step(experiment)

    def in_mesh(*arguments: Any) -> Any:
        with entered(experiment.mesh):
            return distributed.in_turn(step(*arguments))

    return in_mesh


def local_rows(mesh: jax.sharding.Mesh | None, batch_size: int) -> np.ndarray:
    """The numbers of those rows of a batch that the devices of this process need."""
    rows = np.arange(batch_size)
    if mesh is None:
        return rows
    indices = layout.batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[index] for index in indices]))


def placer(mesh: jax.sharding.Mesh | None, batch_size: int) -> Callable[[Any], Any]:
    """Makes of host arrays, which hold this process's `local_rows` of a batch, global ones spread over the mesh.

    This is the one place where tokens are put in `layout.time_order`; sums over tokens do not see it.
    """
    if mesh is None:
        return functools.partial(jax.device_put, device=jax.devices()[0])
    rows = local_rows(mesh, batch_size)

    def put(x: np.ndarray) -> jax.Array:
        if x.ndim == 2:
            x = x[:, layout.time_order(x.shape[1], mesh.shape["context"])]

        def shard(index: Any) -> np.ndarray:
            wanted, *rest = index
            low = np.searchsorted(rows, wanted.start or 0)
            return x[(slice(low, low + len(range(*wanted.indices(batch_size)))), *rest)]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), layout.batch_sharding(mesh, x.ndim), shard)

    return functools.partial(jax.tree.map, put)


def everywhere(mesh: jax.sharding.Mesh | None, tree: Any) -> Any:
    """The arrays of a tree whole, on every device."""
    return tree if mesh is None else distributed.in_turn(_gather_program(mesh)(tree))


@functools.cache
def _gather_program(mesh: jax.sharding.Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=layout.replicated(mesh))


def abstract_batch(experiment: Experiment) -> Batch:
    """Shapes, dtypes and shardings of a batch: what the step is compiled for."""
    cfg, mesh = experiment.cfg, experiment.mesh
    rows_BS = np.zeros((cfg.train.batch, cfg.data.seq_len + 1), np.int32)
    batch = as_batch(rows_BS, rows_BS, np.arange(cfg.train.batch), cfg.data.documents)

    def placed(x: np.ndarray) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else layout.batch_sharding(mesh, x.ndim)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(placed, batch)


# State ------------------------------------------------------------------------------------------------------------


def initial_state(experiment: Experiment) -> TrainState:
    """A run's state before its first step, made where it will live."""

    def make() -> TrainState:
        return _state(experiment, initialize(experiment.model.spec, jax.random.key(experiment.cfg.train.seed)))

    with entered(experiment.mesh):
        return jax.jit(make, out_shardings=shardings(experiment))()


def _state(experiment: Experiment, params: Params) -> TrainState:
    train = experiment.cfg.train
    scalars = hyper(experiment.cfg.optimizer, steps=train.steps, seed=train.seed)
    return TrainState(params, experiment.optimizer.init(params), scalars, {}, zero_counters())


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: _state(experiment, initialize(experiment.model.spec, jax.random.key(0))))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings(experiment)
    )


def device_bytes(tree: Any) -> int:
    """What the arrays of a tree, abstract ones too, take up on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def shardings(experiment: Experiment) -> Any:
    """A TrainState of shardings; step outputs are pinned to them, so that the step compiles once."""
    mesh = experiment.mesh
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(lambda: _state(experiment, initialize(experiment.model.spec, jax.random.key(0))))
        return jax.tree.map(lambda _: single, shapes)
    replicated = layout.replicated(mesh)
    scalars = hyper(experiment.cfg.optimizer, steps=experiment.cfg.train.steps)
    return TrainState(
        params=layout.shardings(experiment.model.spec, mesh),
        opt_state=state_shardings(experiment.optimizer, experiment.model.spec, mesh),
        hyper=jax.tree.map(lambda _: replicated, scalars),
        buffers={},
        counters=jax.tree.map(lambda _: replicated, zero_counters()),
    )


# Looking at a model ------------------------------------------------------------------------------------------------


def float32(cfg: ModelConfig) -> Model:
    """The same model computing in float32: what every reported number is measured with."""
    return decoder.build(dataclasses.replace(cfg, dtype="float32"))


def evaluate_split(
    model: Model,
    params: Params,
    split: TokenSplit,
    data: DataConfig,
    *,
    batch: int,
    limit: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score a split, or its first `limit` batches, in windows of `data.seq_len` tokens, their rows over the mesh.

    `on_batch` is called as each batch begins.
    """
    batches = evaluation_batches(split, data.seq_len, batch, data.documents, local_rows(mesh, batch))
    place = placer(mesh, batch)

    def placed() -> Iterator[Batch]:
        for one in itertools.islice(batches, limit):
            on_batch()
            yield place(one)

    with entered(mesh):
        result = evaluate(model, params, placed(), n_tokens=split.n_tokens, n_bytes=split.n_bytes)
    return dataclasses.replace(result, digest=split.digest)


Documents = Literal["joined", "separate", "alone", "cut"]
"""How documents share the rows that are scored: `data.documents`, or each in rows of its own, or in one, cut there."""


def evaluate_documents(
    model: Model, params: Params, split: TokenSplit, tokenizer: Tokenizer, *, seq_len: int, batch: int, whole: bool
) -> Evaluation:
    """Score every document by itself, read after the tokenizer's begin symbol, or endoftext where it has none.

    In rows of `seq_len` tokens, or its first row alone if not `whole`. The endoftext that closes it is not scored.
    """
    begin_id = tokenizer.endoftext_id if tokenizer.begin_id is None else tokenizer.begin_id
    batches = document_batches(split, seq_len, batch, begin_id, whole=whole)
    result = evaluate(model, params, batches, n_tokens=split.n_tokens - split.n_documents, n_bytes=split.n_bytes)
    return dataclasses.replace(result, digest=split.digest)


def evaluation_metrics(results: Mapping[str, Evaluation], family: str = "val") -> dict[str, float]:
    """`<family>/<set>/loss` and so on; of several sets also their macro average."""
    named = dict(results) | ({"macro": macro_average(results)} if len(results) > 1 else {})
    return {
        f"{family}/{name}/{field}": value
        for name, result in named.items()
        for field, value in {
            "loss": result.loss,
            "loss_stderr": result.loss_stderr,
            "bpb": result.bits_per_byte,
            "accuracy": result.accuracy,
        }.items()
    }


def on_one_device(mesh: jax.sharding.Mesh | None, params: Params) -> Params:
    """The weights whole on this process's first device; others hold one at a time. All processes call it together."""
    return jax.tree.map(lambda x: everywhere(mesh, x).addressable_data(0), params)


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


_PRIMING_BYTES = 1 << 27  # of training text that xz reads first: it takes 22 times as much memory


def compression_baselines(data: Data) -> dict[str, float]:
    """What xz makes of each validation set, alone and after reading the training text, in bits per byte.

    Of a long training text it reads the first 128 MiB. A set without validation text is left out with a warning.
    """
    baselines = {}
    for name, dataset in data.datasets.items():
        if "valid" not in dataset.manifest.splits:
            logger.warning("train.compression_baseline is left out for %s, which has no validation text", name)
            continue
        train = split_text(dataset.split("train"), data.tokenizer, limit=_PRIMING_BYTES)
        valid = split_text(dataset.split("valid"), data.tokenizer)
        baselines[f"val/{name}/xz_bpb"] = compression.xz_bits_per_byte(valid)
        baselines[f"val/{name}/xz_primed_bpb"] = compression.primed_xz_bits_per_byte(train, valid)
    return baselines


def split_text(split: TokenSplit, tokenizer: Tokenizer, limit: int | None = None) -> bytes:
    """The text of a whole split, its documents end to end, or its first `limit` bytes."""
    text = bytearray()
    for ids in split.documents():
        text += tokenizer.decode_bytes(ids.tolist())
        if limit is not None and len(text) >= limit:
            break
    return bytes(text[:limit])


# A trained model --------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What evaluating and generating need of a work directory."""

    cfg: Config
    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int


def load_trained(workdir: epath.PathLike, step: int | None = None) -> Trained:
    """The model of a work directory with the parameters of a checkpoint (default: the newest), on one device."""
    workdir = epath.Path(workdir)
    cfg = from_json(workdir / "config.json")
    model = decoder.build(cfg.model)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), abstract(model.spec))
    parts, _, found = checkpoint.restore_parts(workdir, {"params": shapes}, step=step)
    return Trained(cfg, model, parts["params"], load_tokenizer(workdir / "tokenizer"), found)


def evaluate_trained(
    trained: Trained,
    paths: Iterable[str],
    *,
    split: Literal["train", "valid"],
    batch: int,
    seq_len: int,
    documents: Documents | None = None,
) -> dict[str, Evaluation]:
    """Score a trained model on prepared data sets. Raises DataError for one of another tokenizer.

    By default documents share rows as in training; those of a model that reads a begin symbol have rows of their own.
    """
    if documents is None:
        documents = trained.cfg.data.documents if trained.tokenizer.begin_id is None else "alone"
    model, results = float32(trained.cfg.model), {}
    for path in paths:
        dataset = open_dataset(path, cache=trained.cfg.data.cache)
        if dataset.manifest.tokenizer_hash != trained.tokenizer.hash:
            raise DataError(
                f"{path} was prepared with another tokenizer than this model's; prepare it with --tokenizer-file="
                "WORKDIR/tokenizer"
            )
        if documents == "alone" or documents == "cut":
            results[path] = evaluate_documents(
                model,
                trained.params,
                dataset.split(split),
                trained.tokenizer,
                seq_len=seq_len,
                batch=batch,
                whole=documents == "alone",
            )
        else:
            data = dataclasses.replace(trained.cfg.data, seq_len=seq_len, documents=documents)
            results[path] = evaluate_split(model, trained.params, dataset.split(split), data, batch=batch)
    return results
