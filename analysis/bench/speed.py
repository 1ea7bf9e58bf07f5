"""Tokens per second of the train step and of generation, beside PyTorch where it is installed.

    python -m analysis.bench [--configs quickstart mini_gpt tiny] [--only train|generate] [--repeats 5] [--dtype X]
        [--batch N] [--no-dropout] [--bfloat16] [--weights bfloat16|int8] [--json FILE]

It runs on whatever device JAX finds. The same model is trained in plain JAX beside lmjax where it can be: with AdamW,
in float32, without dropout (`--no-dropout` takes it from all). Other peers are optional: with `torch` a GPT is trained,
eager and compiled, and with `transformers`, too, its GPT-2 generates; with `keras` one of its layers is trained on JAX,
with AdamW in float32. All alternate with lmjax in one process, so that whatever else the machine does falls on all of
them. The mini-GPT and the tiny one begin with lmjax's weights everywhere, read the same batches, and without dropout
must have the same loss, which is given.

Convention: a train step is loss, gradient, clipping and update on random tokens that are already on the device, the
batch's inputs counted as tokens; the loss is that of the first batch after one update on it. Generation is one call,
prompt included, its new tokens counted. First calls, which
compile, are given apart, from cold caches. Figures are medians over rounds, ratios medians of each round's ratio;
CPU-seconds are `time.process_time`, which counts every thread, and compare programs on a machine that is shared.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lmjax.devices import flags
from lmjax.process import start_up

if __name__ == "__main__":
    start_up.tune_allocator()  # starts this process again, so before anything heavy is imported
    flags.set_flags()

import jax
import numpy as np

from analysis.bench import plain_peer
from analysis.bench.gpt import Work, batches
from lmjax.config import Config, load
from lmjax.devices.chips import peak_flops
from lmjax.devices.place import shard_batch
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate_ids, ready
from lmjax.models import decoder
from lmjax.models.flops import sequence_flops
from lmjax.optim.config import ScheduleConfig
from lmjax.registry import without_data
from lmjax.run.assemble import assemble, compiled_step, initial_state
from lmjax.weights import initialize

CONFIGS = Path(__file__).parents[2] / "configs"
CPU_BATCH = {"mini_gpt": 4}
"""The config's own batch takes a CPU half a minute per step."""
PROMPT, NEW_TOKENS = 32, 64
PEERS = ("torch", "keras")
ROWS = (1, 8)
QUEUE = 64
"""Prompts of unequal lengths, more than there are rows."""


# What is measured -------------------------------------------------------------------------------------------------


def read_config(name: str, dtype: Literal["float32", "bfloat16"] | None = None, batch: int | None = None) -> Config:
    """A config with the vocabulary that its recipe asks for, a batch that suits the device, and a constant learning
    rate, which every peer has."""
    cfg = file_config(name)
    (source,) = cfg.data.sources.values()
    assert source.prepare is not None
    model = dataclasses.replace(cfg.model, vocab=source.prepare.tokenizer.vocab, dtype=dtype or cfg.model.dtype)
    optimizer = dataclasses.replace(cfg.optimizer, schedule=ScheduleConfig(name="constant", warmup=0))
    cpu_batch = CPU_BATCH.get(name) if jax.default_backend() == "cpu" else None
    train = dataclasses.replace(cfg.train, batch=batch or cpu_batch or cfg.train.batch)
    return dataclasses.replace(cfg, model=model, optimizer=optimizer, train=train)


def file_config(name: str) -> Config:
    """That of a file in configs/; `tiny` is the mini-GPT with four layers of width 128."""
    if name != "tiny":
        return load(str(CONFIGS / f"{name}.py"))
    small = {"model.layers": 4, "model.embed": 128, "model.heads": 4, "model.mlp": 512, "train.batch": 8}
    vocab = {"data.sources.text.prepare.tokenizer.vocab": 2048}
    return load(str(CONFIGS / "mini_gpt.py"), [f"{key}={value}" for key, value in (small | vocab).items()])


def without_dropout(cfg: Config) -> Config:
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, dropout=0.0, attention_dropout=0.0, embed_dropout=0.0)
    )


def train_steps(cfg: Config) -> Work:
    experiment = assemble(without_data(cfg))
    step, mesh, size = compiled_step(experiment), experiment.mesh, cfg.train.batch
    data = [shard_batch(batch, mesh, size) for batch in batches(cfg)]
    state = initial_state(experiment)

    def run(steps: int) -> float:
        nonlocal state
        for i in range(steps):
            state, metrics = step(state, {}, data[i % len(data)])
        jax.block_until_ready(state)
        total, weight = metrics["loss"]
        return float(total / weight)

    return run


def generations(cfg: Config, lengths: Sequence[int], rows: int, bits: Any = None) -> Work:
    """Prompts of these lengths, so many rows at once, by matrices in so many bits (`GenerateConfig.weights`)."""
    model, vocab = decoder.build(cfg.model), cfg.model.dims["vocab"]
    params = jax.jit(lambda: initialize(model.spec, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, vocab, length).tolist() for length in lengths]
    settings = GenerateConfig(tokens=NEW_TOKENS, temperature=0, stop_at_endoftext=False, rows=rows, weights=bits)
    weights = ready(model, params, settings)

    def run(calls: int) -> None:
        for _ in range(calls):
            generate_ids(model, weights, prompts, settings, endoftext=0, vocab=vocab)

    return run


class Task(NamedTuple):
    """The same work by lmjax, which comes first, and by its peers."""

    name: str
    tokens: int
    """Of one call."""
    contenders: Mapping[str, Callable[[], Work | None]]
    """None: not installed, or not of this config."""
    flops_per_token: float | None = None


def tasks(cfg: Config, only: str | None, bfloat16: bool, bits: str | None = None) -> Iterator[Task]:
    torch, keras = (load_peer(package) for package in PEERS)
    contenders: dict[str, Callable[[], Work | None]]
    if only != "generate":
        T, flops = cfg.data.seq_len, sequence_flops(decoder.build(cfg.model), cfg.data.seq_len).causal
        contenders = {"lmjax": functools.partial(train_steps, cfg)}
        if bfloat16:
            in_16_bits = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype="bfloat16"))
            contenders["lmjax, bfloat16"] = functools.partial(train_steps, in_16_bits)
        contenders["plain JAX"] = functools.partial(plain_peer.train_steps, cfg)
        if torch:
            contenders["PyTorch"] = functools.partial(torch.train_steps, cfg, compiled=False)
            contenders["PyTorch, compiled"] = functools.partial(torch.train_steps, cfg, compiled=True)
        if keras:
            contenders["Keras"] = functools.partial(keras.train_steps, cfg)
        yield Task("train step", cfg.train.batch * T, contenders, flops / T)
    if only != "train":
        yield from generation_tasks(cfg, torch, bits)


def generation_tasks(cfg: Config, torch: Any, bits: str | None) -> Iterator[Task]:
    for rows in ROWS:
        contenders: dict[str, Callable[[], Work | None]] = {
            "lmjax": functools.partial(generations, cfg, [PROMPT] * rows, rows, bits)
        }
        if torch:
            size = {"batch": rows, "prompt": PROMPT, "tokens": NEW_TOKENS}
            contenders["transformers"] = functools.partial(torch.generations, cfg.model, **size)
        yield Task(f"generate, batch {rows}", rows * NEW_TOKENS, contenders)
    lengths = np.random.default_rng(0).integers(1, 2 * PROMPT, QUEUE).tolist()
    ways = {"lmjax": GenerateConfig().rows, "lmjax, one after another": 1}
    contenders = {name: functools.partial(generations, cfg, lengths, rows, bits) for name, rows in ways.items()}
    yield Task(f"generate, {QUEUE} prompts of 1 to {2 * PROMPT - 1} tokens", QUEUE * NEW_TOKENS, contenders)


def load_peer(package: str) -> Any:
    """The module that does the work by this package, or None where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.import_module(f"analysis.bench.{package}_peer")


# Measuring --------------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Tokens per second of one contender, round by round."""

    loss: float | None
    """Of the first batch after one update on it: of contenders that do the same work it is the same."""
    first_call: float
    wall: Sequence[float]
    cpu: Sequence[float]


def measure(task: Task, rounds: int, seconds: float) -> dict[str, Timing]:
    """Rounds of about `seconds` for each contender, in turn. One that fails is named on stderr and left out."""
    works: dict[str, Work] = {}
    first_calls, calls, losses = {}, {}, {}
    for name, make in task.contenders.items():
        try:
            if (work := make()) is None:
                continue
            first_calls[name], _, _ = timed(work, 1)
            once, _, losses[name] = timed(work, 1)
        except Exception as error:
            if name == "lmjax":
                raise
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            continue
        works[name], calls[name] = work, max(1, math.ceil(seconds / once))
    wall: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    for _, (name, work) in itertools.product(range(rounds), works.items()):
        wall_time, cpu_time, _ = timed(work, calls[name])
        wall[name].append(calls[name] * task.tokens / wall_time)
        cpu[name].append(calls[name] * task.tokens / cpu_time)
    return {name: Timing(losses[name], first_calls[name], wall[name], cpu[name]) for name in works}


def timed(work: Work, calls: int) -> tuple[float, float, float | None]:
    """Wall and CPU seconds, and what the work returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = work(calls)
    return time.perf_counter() - wall, time.process_time() - cpu, loss


# The table --------------------------------------------------------------------------------------------------------

COLUMNS = [
    *("config", "work", "by", "tokens/s", "lowest to highest", "tokens per CPU-second", "FLOP/s", "first call, s"),
    *("loss", "lmjax over it, by wall time", "by CPU time"),
]


def rows(config: str, task: Task, timings: Mapping[str, Timing]) -> Iterator[tuple[str, ...]]:
    ours = timings["lmjax"]
    for name, timing in timings.items():
        peer = name != "lmjax"
        yield (
            config,
            task.name,
            name,
            f"{statistics.median(timing.wall):,.0f}",
            f"{min(timing.wall):,.0f} to {max(timing.wall):,.0f}",
            f"{statistics.median(timing.cpu):,.0f}",
            "" if peer or task.flops_per_token is None else utilization(timing, task.flops_per_token),
            f"{timing.first_call:.1f}",
            "" if timing.loss is None else f"{timing.loss:.5f}",
            ratio(ours.wall, timing.wall) if peer else "",
            ratio(ours.cpu, timing.cpu) if peer else "",
        )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"


def utilization(timing: Timing, flops_per_token: float) -> str:
    flops = statistics.median(timing.wall) * flops_per_token
    peak = peak_flops(jax.devices()[0].device_kind)
    mfu = f", MFU {flops / (peak * jax.device_count()):.1%} of bf16 peak" if peak else ""
    return f"{flops / 1e9:,.0f} G{mfu}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shape(name: str, cfg: Config) -> str:
    m, own = cfg.model, file_config(name).train.batch
    batch = f"batch {cfg.train.batch}" + ("" if own == cfg.train.batch else f" (for a CPU; the config's is {own})")
    return (
        f"- `{name}`: {m.layers} layers, d {m.embed}, mlp {m.mlp}, {m.heads} heads, vocabulary {m.vocab}, {m.position} "
        f"positions, dropout {m.dropout:g}, length {cfg.data.seq_len}, {batch}, {cfg.optimizer.name}, {m.dtype}"
    )


def device() -> str:
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {kind}" if jax.default_backend() != "cpu" else f"CPU: {cpu_model()}"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def circumstances(load_before: str) -> str:
    peers = [peer.versions() if (peer := load_peer(package)) else f"no {package}" for package in PEERS]
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("lmjax", "jax", "jaxlib"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{packages}, Python {platform.python_version()}; {'; '.join(peers)}; {cores} cores; "
        f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}; load average {load_before} before, {load_average()} "
        f"after (this program's own included). Greedy generation of {NEW_TOKENS} tokens from prompts of {PROMPT}; "
        "FLOP/s of the step count causal attention and no recomputation."
    )


def load_average() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["quickstart", "mini_gpt", "tiny"]
    parser.add_argument("--configs", nargs="+", default=names[:2], choices=names)
    parser.add_argument("--batch", type=int, help="rows of a train step; default: what suits the device")
    parser.add_argument("--only", choices=["train", "generate"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each contender in each round")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--bfloat16", action="store_true", help="train lmjax in bfloat16, too, beside peers in float32")
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of activations; default: the config's")
    parser.add_argument("--weights", choices=["bfloat16", "int8"], help="generate by matrices in fewer bits")
    arguments = parser.parse_args()

    start_up.run_in_turn()
    load_before = load_average()
    configs = {name: read_config(name, arguments.dtype, arguments.batch) for name in arguments.configs}
    if arguments.no_dropout:
        configs = {name: without_dropout(cfg) for name, cfg in configs.items()}
    records = []
    print(f"{device()}; medians of {arguments.repeats} alternating rounds.\n")
    print("\n".join(shape(name, cfg) for name, cfg in configs.items()) + "\n")
    print(line(COLUMNS))
    print(line(["---"] * len(COLUMNS)))
    for name, cfg in configs.items():
        for task in tasks(cfg, arguments.only, arguments.bfloat16, arguments.weights):
            timings = measure(task, arguments.repeats, arguments.seconds)
            records += [{"config": name, "work": task.name, "by": by, **t._asdict()} for by, t in timings.items()]
            for row in rows(name, task, timings):
                print(line(row), flush=True)
    print("\n" + circumstances(load_before))
    if arguments.json:
        about = {"device": device(), "circumstances": circumstances(load_before), **start_up.git_revision()}
        shapes = [shape(name, cfg) for name, cfg in configs.items()]
        convention = "tokens per second of wall and of CPU time, round by round; first calls in seconds"
        arguments.json.write_text(json.dumps({**about, "convention": convention, "shapes": shapes, "rounds": records}))


if __name__ == "__main__":
    main()
