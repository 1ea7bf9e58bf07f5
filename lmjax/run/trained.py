"""A trained model of a work directory, and its evaluation."""

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax
from etils import epath

from lmjax.config import Config, from_json
from lmjax.data.store.dataset import Dataset, check_same_tokenizer, open_dataset
from lmjax.data.store.shards import TokenSplit
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.devices.place import use_mesh
from lmjax.errors import ConfigError
from lmjax.evaluate.likelihood import Evaluation
from lmjax.evaluate.splits import Documents, evaluate_documents, evaluate_split
from lmjax.generate.small import small_weights
from lmjax.models.model import Model
from lmjax.record import checkpoint
from lmjax.registry import without_data
from lmjax.run.assemble import abstract_sharded, spec_shardings
from lmjax.run.origin import with_found_start
from lmjax.tasks.task import Frozen, Task
from lmjax.weights import Params, abstract


class Trained(NamedTuple):
    """What evaluating and generating need of a work directory."""

    cfg: Config
    model: Model
    scorer: Model
    """The model computing in float32."""
    params: Params
    tokenizer: Tokenizer
    step: int


def load_trained(
    workdir: epath.PathLike,
    step: int | None = None,
    bits: str | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Trained:
    """The model of a work directory with the weights of a checkpoint (default: the newest), on one device, or spread
    over a mesh; on one device perhaps with its matrices in fewer bits, by a name of generate/small.py.

    Raises ConfigError where no language model was trained, what reading the checkpoint and the tokenizer does, and what
    `small_weights` does.
    """
    workdir = epath.Path(workdir)
    cfg = from_json(workdir / "config.json")
    task = without_data(cfg)
    if _base(task) is not None:
        cfg = with_found_start(workdir, cfg)
        task = without_data(cfg)
    if task.language is None:
        raise ConfigError(f"{workdir}: task={cfg.task} trains no language model, which this command reads")
    params, found = restore(workdir, task, step, mesh)
    frozen: Params = {}
    if (base := _base(task)) is not None:
        laid_out = spec_shardings(base.spec, mesh)
        with use_mesh(mesh):
            frozen = base.weights(jax.random.key(cfg.train.seed), task.objective.scalars, laid_out)
    language, tokenizer = task.language, load_tokenizer(workdir / "tokenizer")
    weights = language.weights(frozen, params)
    if bits is not None:
        weights = small_weights(language.model, weights, bits)
    return Trained(cfg, language.model, language.scorer, weights, tokenizer, found)


def restore(
    workdir: epath.PathLike, task: Task, step: int | None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Params, int]:
    """What a run has trained, and the step. Raises CheckpointError where it stands on other frozen weights than this
    task's."""
    shapes = abstract_sharded(abstract(task.spec), spec_shardings(task.spec, mesh))
    params, meta, found = checkpoint.restore_weights(workdir, shapes, step=step)
    if (base := _base(task)) is not None:
        base.check_same(meta, f"{workdir}, step {found}")
    return params, found


def _base(task: Task) -> Frozen | None:
    """What is frozen of a task and its model is not whole without."""
    return None if task.language is None else task.language.frozen


def evaluate_trained(
    trained: Trained,
    paths: Iterable[str],
    *,
    split: Literal["train", "valid"],
    batch: int,
    seq_len: int,
    documents: Documents | None = None,
) -> dict[str, Evaluation]:
    """Score a trained model on prepared data sets, in rows as `rows_of` has them if nothing else is said.

    Raises DataError for a data set of another tokenizer, ConfigError for conversations in other rows than whole ones.
    """
    results = {}
    for path in paths:
        content = opened(trained, path).split(split)
        how = rows_of(trained, content) if documents is None else documents
        if content.n_scored is not None and how != "whole":
            raise ConfigError(
                f"{path} holds conversations, of which only some tokens are scored, and --documents={how} would score "
                "all; leave it out"
            )
        if how == "alone" or how == "cut":
            results[path] = evaluate_documents(
                trained.scorer,
                trained.params,
                content,
                trained.tokenizer,
                seq_len=seq_len,
                batch=batch,
                whole=how == "alone",
            )
        else:
            data = dataclasses.replace(trained.cfg.data, seq_len=seq_len, documents=how)
            results[path] = evaluate_split(trained.scorer, trained.params, content, data, batch=batch)
    return results


def opened(trained: Trained, path: str) -> Dataset:
    """A prepared data set for the model. Raises DataError for one of another tokenizer, and what opening it does."""
    dataset = open_dataset(path, cache=trained.cfg.data.cache)
    check_same_tokenizer(
        {path: dataset},
        trained.tokenizer.hash,
        lambda name: (
            f"{name} was prepared with another tokenizer than this model's; prepare it with --tokenizer-file="
            "WORKDIR/tokenizer"
        ),
    )
    return dataset


def data_of(trained: Trained, workdir: epath.PathLike) -> list[str]:
    """Where the data lie that a run was trained on. Raises ConfigError where it names none."""
    paths = [source.path for source in trained.cfg.data.sources.values()]
    if not paths:
        raise ConfigError(
            f"{workdir} names no data set: give --data=DIR, made by lmjax prepare TEXT --out=DIR "
            f"--tokenizer-file={workdir}/tokenizer"
        )
    return paths


def rows_of(trained: Trained, content: TokenSplit) -> Documents:
    """How documents share rows when nothing is said: conversations are never cut; those of a model that reads a begin
    symbol have rows of their own; all others are as in training, and cut where that was on conversations."""
    if content.n_scored is not None:
        return "whole"
    if trained.tokenizer.begin_id is not None:
        return "alone"
    as_trained = trained.cfg.data.documents
    return "separate" if as_trained == "whole" else as_trained


def described(result: Evaluation, *, cut: bool) -> list[str]:
    """A result for the terminal; of documents that were cut also how much was read."""
    lines = [
        f"  loss           {result.loss:.6f} +- {result.loss_stderr:.6f} nats per token",
        f"  perplexity     {result.perplexity:.4f}",
        f"  bits per byte  {result.bits_per_byte:.6f}",
        f"  accuracy       {result.accuracy:.6f} +- {result.accuracy_stderr:.6f}",
    ]
    coverage = [f"  coverage       {result.coverage:.6f} of the split's tokens"] if cut else []
    return [*lines, *coverage, f"  digest         {result.digest}, which names the set"]
