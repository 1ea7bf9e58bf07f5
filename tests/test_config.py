"""Settings from the command line: what they may be, and that nothing but a message comes of one that may not be."""

import dataclasses
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmjax.config import Config, as_config_dict, load
from lmjax.data.config import PrepareConfig, SourceConfig
from lmjax.errors import ConfigError

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
RECIPE = "data.sources.stdlib.prepare"


def test_a_group_that_may_be_off_is_switched_off_and_on() -> None:
    assert load(QUICKSTART, [f"{RECIPE}=None"]).data.sources["stdlib"].prepare is None
    again = load(QUICKSTART, [f"{RECIPE}=None", f"{RECIPE}.tokenizer.kind=bytes"]).data.sources["stdlib"].prepare
    assert again == dataclasses.replace(PrepareConfig(), tokenizer=dataclasses.replace(again.tokenizer, kind="bytes"))


@pytest.mark.parametrize("group", ["model", "train.sample", "data.sources", "data.sources.stdlib", f"{RECIPE}.tokenizer"])
def test_other_groups_are_set_one_by_one(group: str) -> None:
    for value in ("None", "{}", "1"):
        with pytest.raises(ConfigError, match=rf"^--config\.{group} is a group of settings; set one of "):
            load(QUICKSTART, [f"{group}={value}"])


def test_text_is_taken_as_it_is_and_none_is_none() -> None:
    cfg = load(QUICKSTART, ["tracking.name=123", "tracking.group=[x]", "tracking.entity=e", "tracking.entity=None"])
    assert (cfg.tracking.name, cfg.tracking.group, cfg.tracking.entity) == ("123", "[x]", None)
    assert load(QUICKSTART, ["tracking.project=None"]).tracking.project == "None"  # which may not be off
