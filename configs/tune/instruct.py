"""A language model learns to follow instructions, from pairs of an instruction and a response.

Reproduces  nothing published: 121 made-up lessons (opposites, plurals, sums, words spelled backwards), in the three
            forms that instruction data come in. The loss is that of the responses alone.
Costs       about half a minute on 2 CPU cores.
Command     lmjax train --config=configs/tune/instruct.py --workdir=runs/instruct
            starts from nothing and reads bytes. A model to start from is named by its work directory, from which this
            takes the sizes, the tokenizer and the weights:
                --config=configs/tune/instruct.py:runs/base
            Data of one's own (docs/tuning.md), to be prepared in a place of their own:
                --config.data.sources.lessons.prepare.inputs="('mine.jsonl',)"
                --config.data.sources.lessons.path=data/mine
            Another template than Chollet's: --config.data.sources.lessons.prepare.chat.template=chatml
"""

import re
from pathlib import Path

from ml_collections import ConfigDict

from lmjax.config import as_config_dict, default_config, from_json
from lmjax.data.config import ChatConfig, PrepareConfig, SourceConfig, TokenizerConfig


def get_config(base: str = "") -> ConfigDict:
    config = default_config()
    config.task = "instruct"

    tokenizer = TokenizerConfig(kind="file", path=f"{base}/tokenizer") if base else TokenizerConfig(kind="bytes")
    recipe = PrepareConfig(
        inputs=(str(Path(__file__).with_name("instructions.jsonl")),),
        tokenizer=tokenizer,
        chat=ChatConfig(template="instruction"),
        valid_fraction=0.1,
    )
    path = "data/lessons" + re.sub(r"\W+", "-", f"-{base}" if base else "")
    config.data.sources = {"lessons": as_config_dict(SourceConfig(path=path, prepare=recipe))}
    config.data.documents = "whole"
    config.data.seq_len = 256

    if base:
        config.model = as_config_dict(from_json(f"{base}/config.json").model)
        config.train.init_from = base
    else:
        config.model.layers = 4
        config.model.embed = 64
        config.model.heads = 2
        config.model.mlp = 256
        config.model.activation = "relu_squared"
        config.model.qk_norm = True

    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule.warmup = 10
    config.optimizer.schedule.final_fraction = 0.0

    config.train.steps = 300
    config.train.batch = 8
    config.train.evaluate_every = 50
    config.train.sample.prompts = ("What is the opposite of hot?", "What is 5 plus 4?")
    config.train.sample.tokens = 64
    config.train.sample.temperature = 0.01
    config.checkpoint.every = 100
    return config
