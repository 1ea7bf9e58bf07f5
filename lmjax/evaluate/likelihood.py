"""How probable a model finds held-out text: loss, bits per byte and next-token accuracy, with their standard errors.

Sums over a row are taken on the device in float32, sums over rows on the host in float64, and padding rows have weight
0, so the numbers do not depend on the batch size.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.batch import Batch
from lmjax.devices.mesh import constrain
from lmjax.errors import DataError
from lmjax.evaluate.statistics import Difference, difference, ratio_stderr
from lmjax.losses import token_logprobs
from lmjax.models.model import Model
from lmjax.process.group import wait_on_cpu
from lmjax.weights import Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over the scored tokens of a split."""

    loss: float
    """-log p(next token), nats per token."""
    loss_stderr: float
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """loss * (tokens / bytes of the whole split) / ln 2."""
    accuracy: float
    """Share of tokens that were the most probable one."""
    accuracy_stderr: float
    tokens: int
    """Tokens scored."""
    coverage: float
    """Share of the split's tokens that was scored; below 1, bits_per_byte is an estimate for the split."""
    digest: str = ""
    """The digest of the split, if a split was scored: numbers compare where it is the same."""
    sums_B3: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 3)), repr=False, compare=False)
    """Of every row that was scored, float64: -log p, tokens predicted, weights. Empty for an average over sets."""

    def numbers(self) -> dict[str, float | str]:
        """All of it but the rows."""
        return {name: value for name, value in vars(self).items() if name != "sums_B3"}

    def less(self, other: "Evaluation") -> Difference:
        """The loss less that of another model on the same rows, compared row by row."""
        (nll_B, _, weight_B), (other_nll_B, _, other_weight_B) = self.sums_B3.T, other.sums_B3.T
        return difference((nll_B, weight_B), (other_nll_B, other_weight_B))


def evaluate(
    model: Model, params: Params, batches: Iterable[Batch], *, n_tokens: int, n_bytes: int, chunk: int = 256
) -> Evaluation:
    """Score every target of `batches`, taken from a split of `n_tokens` tokens that spell `n_bytes` bytes.

    The numbers are exact to 1e-6 for a model that computes in float32: build it with `model.dtype="float32"`, whatever
    it was trained in. (Matrix products of float32 then run at full precision on accelerators too.) `chunk` is the
    number of positions of each row whose logits exist at a time. Batches may lie on the host; under `jax.set_mesh` they
    are spread over the mesh already. Each shape of batch compiles one program.

    Raises DataError if there is no token to score.
    """
    score = functools.partial(_score, params, hidden=model.hidden, unembed=model.unembed, head=model.head, chunk=chunk)
    rows, pending = [], None
    for batch in batches:
        dispatched = wait_on_cpu(score(batch))
        if pending is not None:  # read the batch before while the device works on this one
            rows.append(jax.device_get(pending))
        pending = dispatched
    if pending is not None:
        rows.append(jax.device_get(pending))
    sums_B3 = np.concatenate([np.zeros((0, 3)), *rows]).astype(np.float64)
    return _summarize(sums_B3[sums_B3[:, 2] > 0], n_tokens, n_bytes)


@functools.partial(jax.jit, static_argnames=("hidden", "unembed", "head", "chunk"))
def _score(params: Params, batch: Batch, *, hidden, unembed, head, chunk: int) -> jax.Array:
    """Sums of every row, [B, 3]: -log p, tokens predicted, weights."""
    logprobs_BT, correct_BT = token_scores(params, batch, hidden=hidden, unembed=unembed, head=head, chunk=chunk)
    columns = (-logprobs_BT, correct_BT, jnp.ones_like(logprobs_BT))
    sums_B3 = jnp.stack([jnp.sum(column_BT * batch.weights_BT, axis=1) for column_BT in columns], axis=1)
    return constrain(sums_B3, None, None)


def token_scores(
    params: Params, batch: Batch, *, hidden, unembed, head, chunk: int, ends_BA: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """(log p of every target, whether no token was more probable), both float32 [B, T], whatever their weights; the
    same, [B, A], of `ends_BA`, if given, in the place of each row's last target that has a weight."""
    with jax.default_matmul_precision("highest"):
        x_BTD, _, _ = hidden(params, batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT)
        scores = token_logprobs(unembed, head(params), x_BTD, batch.targets_BT, chunk=chunk)
        if ends_BA is None:
            return scores
        last_B = batch.weights_BT.shape[1] - 1 - jnp.argmax(batch.weights_BT[:, ::-1], axis=1)
        x_BAD = jnp.repeat(jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1), ends_BA.shape[1], axis=1)
        return (*scores, *token_logprobs(unembed, head(params), x_BAD, ends_BA, chunk=chunk))


def _summarize(sums_B3: np.ndarray, n_tokens: int, n_bytes: int) -> Evaluation:
    nll_B, correct_B, weight_B = sums_B3.T
    tokens = weight_B.sum()
    if tokens == 0:
        raise DataError("the split has no token to score; prepare more validation text, or use a shorter seq_len")
    loss, accuracy = nll_B.sum() / tokens, correct_B.sum() / tokens
    return Evaluation(
        loss=float(loss),
        loss_stderr=ratio_stderr(nll_B, weight_B),
        perplexity=float(np.exp(loss)),
        bits_per_byte=float(loss * n_tokens / n_bytes / math.log(2)),
        accuracy=float(accuracy),
        accuracy_stderr=ratio_stderr(correct_B, weight_B),
        tokens=int(tokens),
        coverage=float(tokens / n_tokens),
        sums_B3=sums_B3,
    )


def macro_average(evaluations: Mapping[str, Evaluation]) -> Evaluation:
    """Every set counts the same, however long: means of the numbers, perplexity from the mean loss, tokens summed."""
    assert evaluations, "nothing to average"
    sets = list(evaluations.values())

    def mean(name: str) -> float:
        return sum(getattr(one, name) for one in sets) / len(sets)

    def stderr(name: str) -> float:
        return math.sqrt(sum(getattr(one, name) ** 2 for one in sets)) / len(sets)

    return Evaluation(
        loss=mean("loss"),
        loss_stderr=stderr("loss_stderr"),
        perplexity=math.exp(mean("loss")),
        bits_per_byte=mean("bits_per_byte"),
        accuracy=mean("accuracy"),
        accuracy_stderr=stderr("accuracy_stderr"),
        tokens=sum(one.tokens for one in sets),
        coverage=mean("coverage"),
    )
