"""Whole splits of prepared data under a model: which rows are scored, and how they share a mesh."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import jax

from lmjax.data.batch import Batch
from lmjax.data.config import DataConfig
from lmjax.data.packing import packed_batches
from lmjax.data.store.shards import TokenSplit
from lmjax.data.tokenizers.tokenizer import Tokenizer
from lmjax.data.windows import document_batches, evaluation_batches
from lmjax.devices.place import local_rows, shard_batch, use_mesh
from lmjax.evaluate.likelihood import Evaluation, evaluate, macro_average
from lmjax.models import architectures
from lmjax.models.config import ModelConfig
from lmjax.models.model import Model
from lmjax.weights import Params


@functools.cache
def float32(cfg: ModelConfig) -> Model:
    """The same model computing in float32: what every reported number is measured with. Runs of one process share it,
    and so its compiled programs."""
    return architectures.build(dataclasses.replace(cfg, dtype="float32"))


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
    """Score a split, or its first `limit` batches, in rows of `data.seq_len` tokens, which are spread over the mesh.

    Rows hold windows, or whole documents as `data.documents` says; of conversations only what is scored counts, in bits
    per byte too. `on_batch` is called as each batch begins.
    """
    rows = local_rows(mesh, batch)
    if data.documents == "whole":
        batches = packed_batches(split, data.seq_len, batch, rows)
    else:
        batches = evaluation_batches(split, data.seq_len, batch, data.documents, rows)

    def placed() -> Iterator[Batch]:
        for one in itertools.islice(batches, limit):
            on_batch()
            yield shard_batch(one, mesh, batch)

    with use_mesh(mesh):
        result = evaluate(model, params, placed(), n_tokens=split.n_scored or split.n_tokens, n_bytes=split.n_bytes)
    return dataclasses.replace(result, digest=split.digest)


Documents = Literal["joined", "separate", "whole", "alone", "cut"]
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
