r"""The mini-GPT of Chollet, Deep Learning with Python, 3rd edition, chapter 16.

Reproduces  8 post-norm layers, d 512, mlp 2056, 8 heads, vocabulary 32k, length 256, batch 64, Adam with warmup to 2e-4
            over 1000 steps, 58,246 training batches, 500 validation batches. The book reports about 36% next-token
            accuracy and 200k tokens/s on its hardware. Its text is a part of C4.
Costs       954M tokens x 0.26 GFLOP: 2.5e17 FLOPs, about 20 minutes at 200 TFLOP/s; on a CPU core, weeks.
Command     lmjax train --config=configs/mini_gpt.py --workdir=runs/mini_gpt \
                --config.data.sources.text.prepare.inputs='("c4/*.json.gz",)'
"""

from ml_collections import ConfigDict

from lmjax.config import as_config_dict, default_config
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig


def get_config() -> ConfigDict:
    config = default_config()
    recipe = PrepareConfig(inputs=("text/*.json.gz",), tokenizer=TokenizerConfig(kind="unigram", vocab=32_000))
    config.data.sources = {"text": as_config_dict(SourceConfig(path="data/mini_gpt", prepare=recipe))}
    config.data.seq_len = 256

    config.model.context = 256
    config.model.layers, config.model.embed, config.model.heads, config.model.mlp = 8, 512, 8, 2056
    config.model.position = "learned"
    config.model.norm, config.model.norm_epsilon, config.model.norm_position = "layer", 1e-3, "post"
    config.model.embed_norm = True
    config.model.activation = "relu"
    config.model.bias = True
    config.model.dropout, config.model.attention_dropout = 0.1, 0.1
    config.model.residual_init_scale = 1.0

    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-7
    config.optimizer.clip_norm = None
    config.optimizer.schedule.name = "constant"
    config.optimizer.schedule.warmup = 1000

    config.train.batch = 64
    config.train.steps = 58_246
    config.train.evaluate_every = 5000
    config.train.evaluate_batches = 500
    config.train.sample.every = 5000
    config.checkpoint.every = 1000
    return config
