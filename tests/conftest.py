"""What every test may use: one tiny config for each family of decoders that one ModelConfig spans."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lmjax import __main__
from lmjax.models.config import ModelConfig, MoeConfig, RopeConfig

# Here, and in processes that tests start, XLA's older way to fuse operations on a CPU, which compiles in half the time.
# XLA_FLAGS= python -m pytest  tests with what users run; newer releases have nothing else.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

# A property holds however busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Widths are distinct, so that a transposed axis cannot go unnoticed, and where layers follow a pattern there are two
# periods of it and a remainder.
SIZES = {"vocab": 61, "context": 128, "layers": 3, "embed": 24, "heads": 4, "head_dim": 6, "mlp": 40}

FAMILIES: dict[str, ModelConfig] = {
    "gpt2": ModelConfig(**SIZES, norm="layer", bias=True, position="learned"),
    "mini_gpt": ModelConfig(
        **SIZES,
        norm="layer",
        norm_position="post",
        bias=True,
        activation="relu",
        position="learned",
        embed_norm=True,
        dropout=0.1,
        embed_dropout=0.1,
    ),
    "llama3": ModelConfig(
        **SIZES,
        kv_heads=2,
        activation="silu",
        gated=True,
        tied=False,
        rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_context=64),
    ),
    "qwen2": ModelConfig(**SIZES, kv_heads=2, activation="silu", gated=True, qkv_bias=True),
    "qwen3": ModelConfig(**SIZES, kv_heads=2, activation="silu", gated=True, qk_norm=True),
    "gemma2": ModelConfig(
        **SIZES | {"layers": 5},
        pattern=("local", "global"),
        window=5,
        kv_heads=2,
        gated=True,
        norm_position="pre_and_output",
        norm_offset=1.0,
        attention_softcap=5.0,
        attention_scale=0.3,
        logit_softcap=3.0,
        embed_scale=24**0.5,
    ),
    "gemma3": ModelConfig(
        **SIZES | {"layers": 7},  # its own period is five local layers and a global one: two would do nothing new
        pattern=("local", "local", "global"),
        window=3,
        kv_heads=1,
        gated=True,
        norm_position="pre_and_output",
        norm_offset=1.0,
        qk_norm=True,
        embed_scale=24**0.5,
        rope=RopeConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8.0),
    ),
    "olmo2": ModelConfig(
        **SIZES,
        activation="silu",
        gated=True,
        norm_position="output",
        qk_norm=True,
        qk_norm_heads="together",
        attention_bias=True,
        tied=False,
    ),
    "mixtral": ModelConfig(**SIZES, kv_heads=2, activation="silu", gated=True, tied=False, moe=MoeConfig(experts=5)),
    "deepseek_v3": ModelConfig(
        **SIZES,
        activation="silu",
        gated=True,
        bias=True,
        moe=MoeConfig(
            experts=6,
            top_k=3,
            mlp=16,
            dense_first=1,
            score="sigmoid",
            scale=2.5,
            shared_mlp=32,
            shared_gate=True,
            router_z_weight=1e-3,
            bias_rate=1e-3,
        ),
    ),
    "alibi": ModelConfig(**SIZES | {"heads": 3}, position="alibi", activation="relu_squared"),
    "sinusoidal": ModelConfig(**SIZES, position="sinusoidal", norm="layer", activation="gelu_exact"),
    "none": ModelConfig(**SIZES, position="none", gated=True, bias=True),
}


@pytest.fixture(scope="session")
def cfgs() -> dict[str, ModelConfig]:
    """All families by name."""
    return FAMILIES


REPEATED = ("gpt2", "qwen3")  # what is in them is in others, too


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in REPEATED else name for name in FAMILIES])
def cfg(request: pytest.FixtureRequest) -> ModelConfig:
    """Each family in turn."""
    return FAMILIES[request.param]


STORIES = Path(__file__).parents[2] / "shared" / "data" / "checkpoints" / "stories260K"


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory that the command makes of stories260K, a Llama that others trained."""
    if not STORIES.is_dir():
        pytest.skip(f"no trained model at {STORIES}")
    workdir = tmp_path_factory.mktemp("stories") / "run"
    files = {"from-llama2c": STORIES / "stories260K.bin", "tokenizer": STORIES / "tok512.bin", "workdir": workdir}
    arguments = __main__.parse(["convert", *(f"--{name}={value}" for name, value in files.items())])
    assert arguments.function(arguments) == 0
    return workdir


@pytest.fixture(scope="session")
def exported_stories(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as transformers reads it."""
    out = tmp_path_factory.mktemp("exported") / "stories"
    arguments = __main__.parse(["convert", "--to-hf", f"--workdir={stories}", f"--out={out}"])
    assert arguments.function(arguments) == 0
    return out


@pytest.fixture
def on_eight_devices() -> Callable[..., None]:
    """Run the tests of a file in a process of its own: jax fixes its devices when it starts."""
    return functools.partial(run_file, {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"})


@pytest.fixture
def with_xla_as_it_is() -> Callable[..., None]:
    """The same without the tests' own XLA_FLAGS, which are fixed then, too."""
    return functools.partial(run_file, {"XLA_FLAGS": ""})


def run_file(environment: dict[str, str], file: Path, *arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "--durations=5", str(file), *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For modules that compile many tiny programs once, here or in processes that they start: XLA's optimizations would
    cost more than they save."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where runs start again and again: the programs that draw their weights are compiled once, too."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [jax.config.values[name] for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
