"""The recipe from the command line, and as a part of a run's config."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from lmjax import config
from lmjax.__main__ import parse
from lmjax.data.config import ChatConfig, DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from lmjax.data.store.dataset import open_dataset
from lmjax.data.store.manifest import Manifest
from lmjax.errors import ConfigError, LmjaxError
from lmjax.models.config import ModelConfig
from lmjax.run import run
from lmjax.schema import validated

# For every setting of a recipe an argument that gives it another value than its default.
ARGUMENTS: dict[str, Any] = {
    "inputs": ("words.jsonl", ("words.jsonl",)),
    "text_key": ("--text-key=body", "body"),
    "document_separator": ("--document-separator=%", "%"),
    "invalid_utf8": ("--invalid-utf8=skip", "skip"),
    "normalize": ("--normalize=nfc", "nfc"),
    "newlines": ("--newlines=unix", "unix"),
    "unknown": ("--unknown=skip", "skip"),
    "split": ("--split=tail", "tail"),
    "valid_fraction": ("--valid-fraction=0.25", 0.25),
    "seed": ("--seed=7", 7),
    "shard_tokens": ("--shard-tokens=1000", 1000),
    "workers": ("--workers=3", 3),
    "document_bytes": ("--document-bytes=1000", 1000),
    "chat.template": ("--chat=alpaca", "alpaca"),
    "chat.score": ("--score=last", "last"),
    "chat.headers": ("--headers", True),
    "chat.ends": ("--no-ends", False),
    "chat.longest": ("--longest=500", 500),
    "chat.too_long": ("--too-long=left", "left"),
    "tokenizer.kind": ("--tokenizer=chars", "chars"),
    "tokenizer.vocab": ("--vocab=500", 500),
    "tokenizer.sample_bytes": ("--sample-bytes=9999", 9999),
    "tokenizer.path": ("--tokenizer-file=t.json", "t.json"),
    "tokenizer.endoftext": ("--endoftext=<end>", "<end>"),
}


def recipe_of(*arguments: str) -> PrepareConfig:
    """The recipe that the command hands on."""
    found = []

    def instead(cfg: PrepareConfig, path: str) -> Manifest:
        found.append(cfg)
        raise InterruptedError

    parsed = parse(["prepare", "--out=out", *arguments])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.data.prepare.prepare.prepare", instead)
        with pytest.raises(InterruptedError):
            parsed.function(parsed)
    return found[0]


def flat(cfg: PrepareConfig) -> dict[str, Any]:
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    groups = {group: values.pop(group) or ChatConfig() for group in ("tokenizer", "chat")}
    return values | {
        f"{group}.{name}": value for group, of in groups.items() for name, value in dataclasses.asdict(of).items()
    }


def test_every_setting_of_a_recipe_has_an_argument() -> None:
    defaults = flat(PrepareConfig())
    assert ARGUMENTS.keys() == defaults.keys()
    assert recipe_of("stdlib:") == PrepareConfig()  # and without arguments the defaults are those of the config
    for name, (argument, value) in ARGUMENTS.items():
        others = [] if name == "inputs" else ["stdlib:"]
        others += ["--tokenizer-file=t.json"] if name.startswith(("tokenizer.endoftext", "chat.")) else []
        others += ["--chat"] if name.startswith("chat.") and name != "chat.template" else []
        assert flat(recipe_of(argument, *others))[name] == value != defaults[name]


def test_a_tokenizer_is_trained_or_given() -> None:
    with pytest.raises(ConfigError, match="not allowed with argument --tokenizer"):
        recipe_of("stdlib:", "--tokenizer=chars", "--tokenizer-file=t.json")


def test_a_foreign_end_of_text_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek's, for one, is not among the customary names."""
    import tokenizers

    model = tokenizers.models.WordLevel({"word": 0, "<｜end▁of▁sentence｜>": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("word word word")
    command = ["prepare", f"{tmp_path}/a.txt", f"--out={tmp_path}/out", f"--tokenizer-file={tmp_path}/tokenizer.json"]
    parsed = parse([*command, "--endoftext=<｜end▁of▁sentence｜>", "--workers=1", "--valid-fraction=0"])
    assert parsed.function(parsed) == 0
    assert open_dataset(tmp_path / "out").tokenizer().endoftext_id == 1


@pytest.mark.parametrize("seed", [2**64, -1])
@pytest.mark.parametrize("cls", [DataConfig, PrepareConfig])
def test_seeds_that_do_not_fit_are_refused_by_name(cls: type, seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed={seed}: input should be"):
        validated(cls, {"seed": seed})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("**.txt", "**.txt"),
        ("http://host/a.txt", "known are local paths, gs://, s3://"),
        ("", "a path is empty"),
        ("--out=", "a path is empty"),
        ("--vocab=2147483648", "vocab=2147483648: input should be less than"),
        ("--valid-fraction=1e-300", "valid_fraction=1e-300 is less than"),
        ("--sample-bytes=9223372036854775808", "sample_bytes=9223372036854775808: input should be less than"),
    ],
)
def test_what_cannot_be_meant_is_the_users_mistake_and_no_bug(tmp_path: Path, argument: str, message: str) -> None:
    out = [] if argument.startswith("--out") else [f"--out={tmp_path}/out"]
    arguments = parse(["prepare", *([] if not argument.startswith("--") else ["stdlib:"]), *out, argument])
    with pytest.raises(LmjaxError, match=re.escape(message)):
        arguments.function(arguments)
    assert not any(tmp_path.iterdir())


def test_how_many_processes_prepare_is_no_part_of_a_run(tmp_path: Path) -> None:
    def with_recipe(**recipe: Any) -> config.Config:
        source = SourceConfig(path="d", prepare=PrepareConfig(**recipe))
        return config.Config(data=DataConfig(sources={"a.b": source}))

    (tmp_path / "config.json").write_text(config.to_json(with_recipe(workers=1)))
    run.check_unchanged(tmp_path, with_recipe(workers=3), allow=False)
    run.check_unchanged(tmp_path, with_recipe(), allow=False)
    with pytest.raises(ConfigError, match=r"data.sources.a.b.prepare.seed was 0, now 1"):
        run.check_unchanged(tmp_path, with_recipe(seed=1), allow=False)
    with pytest.raises(ConfigError, match=r"tokenizer.kind was 'bpe', now 'chars'"):
        run.check_unchanged(tmp_path, with_recipe(tokenizer=TokenizerConfig(kind="chars")), allow=False)


def test_tokenizers_that_cannot_fit_are_refused_before_they_are_learned() -> None:
    sources = {
        name: SourceConfig(path=f"data/{name}", prepare=PrepareConfig(inputs=(f"{name}.txt",))) for name in ("a", "b")
    }
    message = r"would each learn a tokenizer.* recipe of b tokenizer.kind=file and tokenizer.path=data/a/tokenizer"
    with pytest.raises(ConfigError, match=message):
        validated(DataConfig, {"sources": sources})
    shared = TokenizerConfig(kind="file", path="data/a/tokenizer")
    sources["b"] = SourceConfig(path="data/b", prepare=PrepareConfig(inputs=("b.txt",), tokenizer=shared))
    data = DataConfig(sources=sources)
    config.Config(data=data, model=ModelConfig(vocab=32_000))
    with pytest.raises(ConfigError, match=r"model.vocab=31999 is smaller than the 32000 tokens .*sources.a learns"):
        validated(config.Config, {"data": data, "model": {"vocab": 31_999}})
