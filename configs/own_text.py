"""The quickstart's model on text of your own: any folder, in any language, however little there is.

Reproduces  nothing published: it is the shortest way from a folder to a model of what is in it. Text is read as bytes,
            which fits every language and needs no vocabulary to be learned from the text; a part of every file, or a
            few of many files, is kept for validation, and xz -9e compresses the same part for comparison.
Costs       about three minutes on 2 CPU cores, and a second or two per megabyte of text for reading and for xz.
Command     lmjax train --config=configs/own_text.py:my_text --workdir=runs/mine
            with my_text a folder (.txt, .txt.gz, .py, .jsonl, .jsonl.gz, .jsonl.zst, .json.gz, .parquet), a file or a
            glob. From a few megabytes on, learned pieces do better than bytes:
                --config.data.sources.own.prepare.tokenizer.kind=bpe
                --config.data.sources.own.prepare.tokenizer.vocab=2048
"""

import re
from pathlib import Path
from runpy import run_path

from ml_collections import ConfigDict

from lmjax.config import as_config_dict
from lmjax.data.config import PrepareConfig, SourceConfig, TokenizerConfig


def get_config(folder: str = "my_text") -> ConfigDict:
    config = run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    recipe = PrepareConfig(inputs=(folder,), tokenizer=TokenizerConfig(kind="bytes"))
    path = "data/" + (re.sub(r"\W+", "-", folder).strip("-") or "here")
    config.data.sources = {"own": as_config_dict(SourceConfig(path=path, prepare=recipe))}
    config.train.sample.prompts = ("\n",)
    return config
