r"""Shakespeare, character by character, as nanoGPT's first example.

Reproduces  nanoGPT's presets for shakespeare_char (github.com/karpathy/nanoGPT): `cpu` (4 layers, d 128, context 64,
            batch 12, 2000 steps), reported 1.88 nats per character by sampling; `gpu` (6 layers, d 384, context 256,
            batch 64, 5000 steps, dropout 0.2), reported 1.4697. nanoGPT also drops attention weights; here dropout
            acts on embeddings and on the outputs of attention and mlp (--config.model.attention_dropout=0.2 adds
            that, without flash attention). `modern` has the cpu preset's size and steps
            with rotary positions, RMSNorm and Muon.
Costs       cpu and modern: a minute or two on 2 CPU cores. gpu: minutes on one GPU.
Command     lmjax train --config=configs/shakespeare_char.py:cpu --workdir=runs/shakespeare \
                --config.data.sources.shakespeare.prepare.inputs='("input.txt",)'
            with input.txt the 1,115,394 characters of tiny Shakespeare from char-rnn.
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.errors import ConfigError


def get_config(preset: str = "cpu") -> ConfigDict:
    if preset not in PRESETS:
        raise ConfigError(f"shakespeare_char.py:{preset}: the presets are {', '.join(PRESETS)}")
    config = default_config()
    recipe = PrepareConfig(
        inputs=("input.txt",),
        tokenizer=TokenizerConfig(kind="chars"),
        split="tail",
        valid_fraction=0.1,
    )
    config.data.sources = {"shakespeare": as_config_dict(SourceConfig(path="data/shakespeare_char", prepare=recipe))}
    PRESETS[preset](config)
    config.data.seq_len = config.model.context
    return config


def cpu(config: ConfigDict) -> None:
    """nanoGPT's own blocks: learned positions, LayerNorm without biases, GELU, tied head."""
    config.model.layers, config.model.embed, config.model.heads, config.model.mlp = 4, 128, 4, 512
    config.model.context = 64
    config.model.position = "learned"
    config.model.norm = "layer"
    config.model.norm_epsilon = 1e-5
    config.model.activation = "gelu_exact"
    config.model.init_std = 0.02

    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.99
    config.optimizer.schedule.warmup = 100
    config.train.batch = 12
    config.train.steps = 2000
    config.train.evaluate_every = 250
    config.train.evaluate_batches = 20
    config.train.evaluate_batch = 64
    config.train.sample.prompts = ("\n",)
    config.train.sample.tokens = 500


def modern(config: ConfigDict) -> None:
    cpu(config)
    config.model.position = "rope"
    config.model.norm = "rms"
    config.model.heads = 2
    config.model.activation = "relu_squared"
    config.model.init_std = None
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule.final_fraction = 0.0


def gpu(config: ConfigDict) -> None:
    cpu(config)
    config.model.layers, config.model.embed, config.model.heads, config.model.mlp = 6, 384, 6, 1536
    config.model.context = 256
    config.model.dropout = 0.2
    config.model.embed_dropout = 0.2
    config.model.dtype = "bfloat16"
    config.train.batch = 64
    config.train.steps = 5000


PRESETS = {"cpu": cpu, "gpu": gpu, "modern": modern}
