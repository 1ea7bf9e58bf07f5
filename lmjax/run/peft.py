"""Adapters of a work directory in PEFT's format, and back."""

from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.errors import ConfigError
from lmjax.finetune.peft.directory import format_of, read_adapter, write_adapter
from lmjax.finetune.peft.format import Adapter
from lmjax.finetune.tune import ADAPTER
from lmjax.models.config import ModelConfig
from lmjax.record import checkpoint
from lmjax.record.checkpoint import Checkpoints
from lmjax.registry import without_data
from lmjax.run.convert import SEQ_LEN, new_workdir, write_tokenizer
from lmjax.tasks.start import directory_of, model_of, pinned, tokenizer_of
from lmjax.train.config import AdapterConfig, TrainConfig, TuneConfig
from lmjax.weights import Params, abstract


def to_peft(workdir: str, out: str, *, step: int | None = None) -> list[str]:
    """Write the adapters that a run has trained; the names of the files.

    Raises ConfigError for a run that trains none that PEFT has, or has other weights than its base beside them;
    CheckpointError for a checkpoint that is missing or damaged.
    """
    cfg = configs.from_json(epath.Path(workdir) / "config.json")
    adapter = cfg.tune.adapter
    if adapter is None or format_of(adapter.name) is None:
        has = "no adapters" if adapter is None else f"adapters of the kind {adapter.name}"
        raise ConfigError(f"{workdir} has {has}, which are not written in PEFT's form; those of lora, dora and ia3 are")
    if cfg.tune.train:
        raise ConfigError(
            f"{workdir} has trained {cfg.tune.train[0]}, too, which PEFT's file has no place for; merge it"
        )
    if cfg.tune.fresh:
        raise ConfigError(
            f"{workdir} has {cfg.tune.fresh[0]} drawn anew (tune.fresh), which PEFT's file has no place for; merge it"
        )
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = without_data(cfg).spec
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), abstract(spec))
    params, _, _ = checkpoint.restore_weights(workdir, shapes, step=step)
    base = "" if cfg.train.init_from is None else str(directory_of(cfg.train.init_from))
    return write_adapter(Path(out), Adapter(adapter, params[ADAPTER]), cfg.model, base)


def from_peft(directory: str, base: str, workdir: str) -> AdapterConfig:
    """Make a work directory of an adapter, standing on the run or the Hugging Face directory `base`.

    Raises what `read_adapter` does, and ConfigError for a base that is not there.
    """
    target, model = new_workdir(workdir), model_of(base)
    cfg, params = standing_on(Path(directory), pinned(base), model)
    task = without_data(cfg)
    task.start.check()
    assert task.frozen is not None
    meta = {"source": directory, "base": task.frozen.start.digest()}
    checkpoints = Checkpoints(target / "checkpoints", cfg.checkpoint)
    checkpoints.save(0, {"params": jax.tree.map(jnp.asarray, params)}, meta)
    checkpoints.wait()
    write_tokenizer(*tokenizer_of(base, model), target)
    configs.write_json(target / "config.json", cfg)
    assert cfg.tune.adapter is not None
    return cfg.tune.adapter


def standing_on(directory: Path, origin: str, model: ModelConfig) -> tuple[Config, Params]:
    """The config and the params of a run that has trained PEFT's adapter beside the weights of `origin`."""
    adapter = read_adapter(directory, model)
    data = DataConfig(seq_len=min(SEQ_LEN, model.context))
    train, tune = TrainConfig(init_from=origin), TuneConfig(adapter=adapter.cfg)
    return Config(model=model, data=data, train=train, tune=tune), {ADAPTER: adapter.params}
