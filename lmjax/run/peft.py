"""LoRA of a work directory in PEFT's format, and back."""

from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath

from lmjax import config as configs
from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.errors import ConfigError
from lmjax.finetune.peft import LowRankAdapter, read_adapter, write_adapter
from lmjax.finetune.tune import ADAPTER
from lmjax.hf.tokenizer_files import read_tokenizer
from lmjax.record import checkpoint
from lmjax.record.checkpoint import Checkpoints
from lmjax.registry import without_data
from lmjax.run.convert import SEQ_LEN, new_workdir
from lmjax.tasks.pretrain import save_tokenizer
from lmjax.tasks.start import hugging_face, model_of, pinned
from lmjax.train.config import AdapterConfig, TrainConfig, TuneConfig
from lmjax.weights import abstract


def to_peft(workdir: str, out: str, *, step: int | None = None) -> list[str]:
    """Write the LoRA that a run has trained; the names of the files.

    Raises ConfigError for a run that trains no LoRA, or other weights beside it; CheckpointError for a checkpoint that
    is missing or damaged.
    """
    cfg = configs.from_json(epath.Path(workdir) / "config.json")
    adapter = cfg.tune.adapter
    if adapter is None or adapter.name != "lora":
        raise ConfigError(f"{workdir} has no LoRA; lmjax convert --to-hf writes the whole model")
    if cfg.tune.train:
        raise ConfigError(
            f"{workdir} has trained {cfg.tune.train[0]}, too, which PEFT's file has no place for; merge it"
        )
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = without_data(cfg).spec
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), abstract(spec))
    params, _, _ = checkpoint.restore_weights(workdir, shapes, step=step)
    base = (cfg.train.init_from or "").rpartition("@")[0]
    return write_adapter(Path(out), LowRankAdapter(adapter, params[ADAPTER]), cfg.model, base)


def from_peft(directory: str, base: str, workdir: str) -> AdapterConfig:
    """Make a work directory of an adapter, standing on the run or the Hugging Face directory `base`.

    Raises what `read_adapter` does, and ConfigError for a base that is not there.
    """
    target = new_workdir(workdir)
    adapter = read_adapter(Path(directory), model_of(base))
    model, tune = model_of(base), TuneConfig(adapter=adapter.cfg)
    data = DataConfig(seq_len=min(SEQ_LEN, model.context))
    cfg = Config(model=model, data=data, train=TrainConfig(init_from=pinned(base)), tune=tune)
    task = without_data(cfg)
    task.start.check()
    assert task.frozen is not None
    meta = {"source": directory, "base": task.frozen.start.digest()}
    checkpoints = Checkpoints(target / "checkpoints", cfg.checkpoint)
    checkpoints.save(0, {"params": {ADAPTER: jax.tree.map(jnp.asarray, adapter.params)}}, meta)
    checkpoints.wait()
    _copy_tokenizer(base, cfg, target)
    configs.write_json(target / "config.json", cfg)
    return adapter.cfg


def _copy_tokenizer(base: str, cfg: Config, workdir: epath.Path) -> None:
    found, saved = hugging_face(base), epath.Path(base.partition("@")[0]) / "tokenizer"
    if found is None and saved.exists():
        save_tokenizer(load_tokenizer(saved), workdir)
    if found is None:
        return
    tokenizer, files = read_tokenizer(found.path, cfg.model)
    if tokenizer is not None:
        save_tokenizer(tokenizer, workdir)
        for name, content in files.items():
            (workdir / "tokenizer" / name).write_bytes(content)
