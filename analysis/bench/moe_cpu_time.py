"""CPU time of a mixture's experts over that of a dense mlp of equal FLOPs, one layer forward and backward, in one run:

python -m analysis.bench.moe_cpu_time
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.models.config import ModelConfig, MoeConfig
from lmjax.models.mlp import mlp, mlp_weights
from lmjax.models.moe import grouped, moe, routing
from lmjax.weights import bind, fan_in, initialize

B, T, ROUNDS = 8, 256, 9


def main() -> None:
    cfg = ModelConfig(vocab=1, embed=64, mlp=256, moe=MoeConfig(experts=8, top_k=2, mlp=128))
    dense = initialize(bind(mlp_weights(cfg, fan_in, fan_in), cfg.dims), jax.random.key(0))
    experts = initialize(bind(moe.weights(cfg, fan_in, fan_in)["experts"], cfg.dims), jax.random.key(1))
    x_BTD = jax.random.normal(jax.random.key(2), (B, T, cfg.embed))
    scores_BTE = jax.nn.softmax(jax.random.normal(jax.random.key(3), (B, T, 8)))
    chosen = routing.choose(scores_BTE, None, jnp.ones((B, T), bool), cfg.moe)
    some = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, dispatch="capacity"))

    products = {
        "dense": (gradient(lambda p, x: mlp(p, x, cfg)), dense),
        "dropless, by blocks": (gradient(lambda p, x: moe.dropless(p, x, chosen, cfg)[0]), experts),
        "capacity 1.25": (gradient(lambda p, x: moe.capacity(p, x, chosen, some)[0]), experts),
        "dropless, ragged_dot": (gradient(lambda p, x: moe.dropless(p, x, chosen, cfg)[0]), experts),
    }
    for name, (run, p) in products.items():
        grouped.platform = functools.partial(str, "another" if name.endswith("ragged_dot") else "cpu")
        jax.block_until_ready(run(p, x_BTD))
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(ROUNDS):
        for name, (run, p) in products.items():
            start = time.process_time()
            jax.block_until_ready(run(p, x_BTD))
            seconds[name].append(time.process_time() - start)
    for name, taken in seconds.items():
        print(f"{name:22} {statistics.median(taken) / statistics.median(seconds['dense']):5.2f}")


def gradient(layer: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], Any]:
    return jax.jit(jax.grad(lambda p, x_BTD: jnp.sum(jnp.sin(layer(p, x_BTD))), argnums=(0, 1)))


if __name__ == "__main__":
    main()
