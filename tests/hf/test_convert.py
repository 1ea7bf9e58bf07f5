"""The convert command: a work directory like any other, and back to files that transformers loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmjax import __main__ as program
from lmjax.data.config import TokenizerConfig
from lmjax.data.tokenizer import train_tokenizer
from lmjax.errors import CheckpointError, ConfigError
from lmjax.experiment import load_trained
from lmjax.hf.imported import CONFIG, Imported, read_checkpoint, write_checkpoint
from lmjax.hf.tokenizer_json import as_json
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.weights import by_path, initialize

pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")

CFG = ModelConfig(
    vocab=300, context=64, layers=2, embed=16, heads=4, kv_heads=2, mlp=24, activation="silu", gated=True, tied=False
)


def lmjax(*arguments: str) -> int:
    parsed = program.parse(arguments)
    return parsed.function(parsed)


def tokenizer_json() -> str:
    """A byte-level tokenizer with an end of text of its own."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|stop|>"])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, as it might be downloaded."""
    directory = tmp_path_factory.mktemp("theirs")
    params = initialize(decoder.weights(CFG), jax.random.key(0))
    write_checkpoint(directory, Imported(CFG, params, None, {}), shard_bytes=20_000)
    (directory / "tokenizer.json").write_text(tokenizer_json())
    settings = {
        "eos_token": {"__type": "AddedToken", "content": "<|stop|>", "special": True},
        "chat_template": "{{ messages }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    return directory


@pytest.fixture(scope="module")
def workdir(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runs") / "imported"
    assert lmjax("convert", f"--from-hf={theirs}", f"--workdir={target}") == 0
    return target


def test_an_imported_work_directory_is_like_any_other(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", f"--workdir={workdir}", "--prompt=ab", "--tokens=5", "--temperature=0"],
                    ["verify", str(workdir)], ["inspect", str(workdir)]):  # fmt: skip
        assert lmjax(*command) == 0
    out = capsys.readouterr().out
    assert out.startswith("ab") and "as it was sealed" in out and "params/embed" in out
    trained = load_trained(workdir)
    assert trained.tokenizer.endoftext == "<|stop|>" and trained.step == 0


def test_back_to_hugging_face(theirs: Path, workdir: Path, tmp_path: Path) -> None:
    """Tensors, tokenizer and the files beside it come back as they were."""
    out = tmp_path / "out"
    assert lmjax("convert", "--to-hf", f"--workdir={workdir}", f"--out={out}", "--shard-gb=1e-5") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (theirs / name).read_bytes()
    assert json.loads((out / CONFIG).read_text())["eos_token_id"] == 256
    first, second = (by_path(read_checkpoint(directory).params) for directory in (theirs, out))
    for path, x in first.items():
        np.testing.assert_array_equal(x, second[path], err_msg=path)


def test_transformers_loads_the_tokenizer(workdir: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    lmjax("convert", "--to-hf", f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--dtype=bfloat16")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "naïve  café\n\tdéjà vu"
    assert tokenizer(text)["input_ids"] == load_trained(workdir).tokenizer.encode(text)
    assert tokenizer.eos_token == "<|stop|>"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_a_checkpoint_without_a_tokenizer(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    write_checkpoint(bare, read_checkpoint(theirs)._replace(tokenizer=None, files={}))
    assert lmjax("convert", f"--from-hf={bare}", f"--workdir={tmp_path / 'run'}") == 0
    assert "brings no tokenizer" in capsys.readouterr().out


def test_a_run_is_not_written_over(theirs: Path, workdir: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a run already"):
        lmjax("convert", f"--from-hf={theirs}", f"--workdir={workdir}")


@pytest.mark.parametrize("arguments", [[], ["--from-hf=x", "--to-hf"], ["--to-hf"]])
def test_one_direction_at_a_time(workdir: Path, arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"not allowed with|required|needs --out"):
        lmjax("convert", f"--workdir={workdir}", *arguments)


TEXT = "def f(x):\n    return  'naïve  café' \t# 1234 déjà vu\n\n" * 3


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe", "unigram"])
def test_our_tokenizers_as_tokenizer_json(kind: Any, tmp_path: Path) -> None:
    """The ids of a tokenizer trained here are those of the file that transformers reads."""
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab=285), [TEXT, "return f(f(f))", "café " * 20])
    content = as_json(tokenizer)
    assert content is not None
    theirs = tokenizers.Tokenizer.from_str(content.decode())
    for text in (TEXT, "  return café \t\n\n (f)", "f" * 50):
        assert theirs.encode(text).ids == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.token_to_id(tokenizer.endoftext) == tokenizer.endoftext_id


def test_memory_is_that_of_the_params_and_a_tensor(tmp_path: Path) -> None:
    """Beside the params, no more than 1.3 times the largest shard: measured in a process of its own."""
    cfg = ModelConfig(
        vocab=4096, context=64, layers=4, embed=512, heads=8, mlp=4096, activation="silu", gated=True, tied=False
    )
    params = initialize(decoder.weights(cfg), jax.random.key(0))
    write_checkpoint(tmp_path, Imported(cfg, params, None, {}), shard_bytes=40_000_000)
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    measured: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    shard = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    extra = measured["peak"] - measured["params"]
    assert extra <= 1.3 * shard, f"{extra / shard:.2f} times the largest shard of {shard / 1e6:.0f} MB"


_MEASURE = """
import json, resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from lmjax.hf.imported import read_checkpoint
from lmjax.weights import by_path
import safetensors
jnp.zeros(8).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
imported = read_checkpoint(Path(sys.argv[1]))
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps({"peak": peak, "params": sum(x.nbytes for x in by_path(imported.params).values())}))
"""
