"""The convert command: a work directory like any other, and back to files that transformers loads."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmjax import __main__ as program
from lmjax.data.config import TokenizerConfig
from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.data.tokenizers.load import train_tokenizer
from lmjax.errors import CheckpointError, ConfigError, LmjaxError, visible
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate
from lmjax.hf.imported import CONFIG, Imported, read_checkpoint, write_checkpoint
from lmjax.hf.tokenizer_json import as_json
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.process import ending
from lmjax.run.trained import load_trained
from lmjax.weights import by_path, initialize

pytestmark = pytest.mark.usefixtures("quick_compilation")

pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")

CFG = ModelConfig(
    vocab=300, context=64, layers=2, embed=16, heads=4, kv_heads=2, mlp=24, activation="silu", gated=True, tied=False
)

LARGE = dataclasses.replace(CFG, vocab=32_000, layers=12, embed=768, heads=12, kv_heads=4, mlp=2048)


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
        "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}",
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


MISTAKES = [
    "generate --workdir=RUN --system=x --prompt=y",
    "generate --workdir=RUN --beams=2 --temperature=0.9",
    "generate --workdir=RUN --beams=2 --top-k=3",
    "generate --workdir=RUN --beams=2 --min-p=0.3",
    "generate --workdir=RUN --beams=100000000000000",
    "generate --workdir=RUN --tokens=0",
    "generate --workdir=RUN --tokens=99999999999",
    "generate --workdir=RUN --seed=-1",
    "generate --workdir=RUN --seed=18446744073709551616",
    "generate --workdir=RUN --temperature=nan",
    "generate --workdir=RUN --temperature=1e-40",
    "generate --workdir=RUN --step=7",
    "generate --workdir=RUN --step=-1",
    "generate --workdir=FILE",
    "generate --workdir=EMPTY",
    "generate --workdir=GARBAGE",
    "generate --workdir=LIST",
    "generate --workdir=UNREADABLE --prompt=x",
    "evaluate --workdir=RUN",
    "evaluate --workdir=RUN --data=EMPTY",
    "evaluate --workdir=RUN --data=FILE",
    "evaluate --workdir=RUN --data=RUN",
    "evaluate --workdir=RUN --batch=0",
    "evaluate --workdir=RUN --batch=-3",
    "evaluate --workdir=RUN --seq-len=0",
    "evaluate --workdir=RUN --seq-len=99999999999999999999",
    "evaluate --workdir=RUN --seq-len=" + "9" * 5000,
    "evaluate --workdir=FILE",
    "inspect FILE",
    "inspect EMPTY",
    "inspect missing",
    "inspect RUN --step=9",
    "verify FILE",
    "verify EMPTY",
    "verify missing",
    "convert --from-hf=THEIRS --workdir=NEW --out=x",
    "convert --from-hf=THEIRS --workdir=NEW --step=0",
    "convert --from-hf=THEIRS --workdir=NEW --dtype=float32",
    "convert --from-hf=THEIRS --workdir=NEW --shard-gb=5",
    "convert --from-hf=THEIRS --workdir=NEW --tokenizer=FILE",
    "convert --from-hf=THEIRS --workdir=THEIRS",
    "convert --from-hf=THEIRS --workdir=FILE",
    "convert --from-hf=THEIRS --workdir=OCCUPIED",
    "convert --from-hf=FILE --workdir=NEW",
    "convert --from-hf= --workdir=NEW",
    "convert --from-hf=THEIRS --workdir=",
    "convert --from-llama2c=EMPTY --tokenizer=FILE --workdir=NEW",
    "convert --from-llama2c=FILE --tokenizer=FILE --workdir=NEW",
    "convert --from-llama2c=FILE --workdir=NEW",
    "convert --to-hf --workdir=RUN --out=NEW --tokenizer=FILE",
    "convert --to-hf --workdir=RUN --out=FILE",
    "convert --to-hf --workdir=RUN --out=RUN",
    "convert --to-hf --workdir=RUN --out=OCCUPIED",
    "convert --to-hf --workdir=RUN --out=FILE/below",
    "convert --to-hf --workdir=RUN --out=NEW --step=4",
    "convert --to-hf --workdir=RUN --out=NEW --shard-gb=0",
    "convert --to-hf --workdir=RUN --out=NEW --shard-gb=nan",
    "convert --to-hf --workdir=RUN --out=NEW --shard-gb=inf",
    "convert --to-hf --workdir=EMPTY --out=NEW",
    "convert --to-hf --workdir=FILE --out=NEW",
]


@pytest.fixture(scope="module")
def places(theirs: Path, workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    found = {name: root / name.lower() for name in ("EMPTY", "GARBAGE", "LIST", "OCCUPIED", "FILE", "NEW")}
    for name in ("EMPTY", "GARBAGE", "LIST", "OCCUPIED"):
        found[name].mkdir()
    found["FILE"].write_text("a file")
    (found["GARBAGE"] / "config.json").write_bytes(b"\xff\xfe\x00")
    (found["LIST"] / "config.json").write_text("[1]")
    (found["OCCUPIED"] / "model.safetensors").write_text("somebody's")
    unreadable = Path(shutil.copytree(workdir, root / "unreadable"))
    (unreadable / "tokenizer" / "tokenizer.json").write_bytes(b"\x80")
    return found | {"THEIRS": theirs, "RUN": workdir, "UNREADABLE": unreadable}


@pytest.mark.parametrize("words", MISTAKES, ids=lambda words: words[:60])
def test_a_mistake_is_no_bug_and_changes_nothing(words: str, places: dict[str, Path]) -> None:
    """Each is told in one line, and no file that was there is changed."""
    for name, path in places.items():
        words = words.replace(f"={name}", f"={path}").replace(f" {name}", f" {path}")
    before = contents(places)
    with pytest.raises(LmjaxError) as caught:
        lmjax(*words.split(" "))
    assert caught.value.exit_code in (2, 3, 4)
    assert contents(places).items() >= before.items()


def contents(places: dict[str, Path]) -> dict[Path, bytes]:
    files = (one for path in places.values() for one in [path, *path.rglob("*")] if one.is_file())
    return {path: path.read_bytes() for path in files}


def test_no_memory_is_no_bug() -> None:
    for error in (MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):
        with pytest.raises(ConfigError, match="more memory than there is; lower --tokens"), \
                ending.within_memory("--tokens"):  # fmt: skip
            raise error
    with pytest.raises(RuntimeError, match="other"), ending.within_memory("--tokens"):
        raise RuntimeError("other")


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


def test_chat_answers_the_rendered_conversation(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model reads the template's text with its symbols, and the answer alone is printed."""
    trained, settings = load_trained(workdir), ["--tokens=6", "--temperature=0", "--ignore-endoftext"]
    conversations = ["<system>Be brief.<|stop|><user>Hi<|stop|><model>", "<user>Hi<|stop|><model>"]
    read = [trained.tokenizer.encode_symbols(text) for text in conversations]
    assert [ids.count(256) for ids in read] == [2, 1]
    cfg = GenerateConfig(tokens=6, temperature=0, stop_at_endoftext=False)
    answers = [one.text for one in generate(trained.model, trained.params, trained.tokenizer, read, cfg)]
    for system, answer in zip((["--system=Be brief."], []), answers, strict=True):
        assert lmjax("generate", f"--workdir={workdir}", "--chat", "--prompt=Hi", *system, *settings) == 0
        assert capsys.readouterr().out == visible(answer) + "\n"
    assert lmjax("generate", f"--workdir={workdir}", "--chat", "--prompt=Hi", "--prompt=Hi", *settings) == 0
    assert capsys.readouterr().out == f"--- 'Hi'\n{visible(answers[1])}\n" * 2
    with pytest.raises(ConfigError, match="--chat needs something to answer"):
        lmjax("generate", f"--workdir={workdir}", "--chat")


def loss_of(workdir: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `prepare` and `evaluate --json` find of a file of texts, by the model's own tokenizer."""
    data = texts.parent / "data"
    given = [str(texts), f"--out={data}", f"--tokenizer-file={workdir}/tokenizer", "--valid-fraction=0", "--workers=1"]
    assert lmjax("prepare", *given) == 0
    capsys.readouterr()
    where = [f"--workdir={workdir}", f"--data={data}", "--split=train", "--documents=alone", "--seq-len=16"]
    assert lmjax("evaluate", *where, "--json") == 0
    return json.loads(capsys.readouterr().out)[str(data)]


def test_a_loss_with_the_model_s_own_tokenizer(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """prepare and evaluate, against a forward pass over every document by itself."""
    texts = ["abc def", "x" * 9, "naïve"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = loss_of(workdir, tmp_path / "texts.jsonl", capsys)
    trained = load_trained(workdir)
    losses = []
    for text in texts:
        ids = np.array([256, *trained.tokenizer.encode(text)])
        logp_TV = jax.nn.log_softmax(trained.model.logits(trained.params, ids[None, :-1])[0])
        losses += (-np.take_along_axis(logp_TV, ids[1:, None], axis=1)).ravel().tolist()
    assert (found["step"], found["weights"], found["split"]) == (trained.step, None, "train")
    assert found["tokens"] == len(losses)
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / len("".join(texts).encode()) / np.log(2), abs=1e-5)


def test_a_standard_error_of_one_row_is_null(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("abc def")
    found = loss_of(workdir, tmp_path / "one.txt", capsys)
    assert found["loss"] > 0 and found["loss_stderr"] is found["accuracy_stderr"] is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process held")
@pytest.mark.parametrize("direction", ["from", "to"])
def test_memory_is_that_of_the_params_and_a_shard(tmp_path: Path, direction: str) -> None:
    """The whole command, over what it takes for a tiny model: the params, and 1.3 times the largest shard at most."""
    peaks, sizes = [], []
    for name, cfg in {"tiny": CFG, "large": LARGE}.items():
        params, tokenizer = initialize(decoder.weights(cfg), jax.random.key(0)), ByteTokenizer()
        source, workdir, out = (tmp_path / name / part for part in ("source", "run", "out"))
        write_checkpoint(source, Imported(cfg, params, None, {}), shard_bytes=200_000_000)
        peak = peak_memory("convert", f"--from-hf={source}", f"--workdir={workdir}")
        if direction == "to":
            tokenizer.save(workdir / "tokenizer")
            peak = peak_memory("convert", "--to-hf", f"--workdir={workdir}", f"--out={out}", "--shard-gb=0.2")
        peaks.append(peak)
        sizes.append(sum(x.nbytes for x in by_path(params).values()))
        shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
    extra = peaks[1] - peaks[0] - sizes[1]
    print(f"{direction}: params {sizes[1] / 1e6:.0f} MB, shard {shard / 1e6:.0f} MB, beside them {extra / 1e6:.0f} MB")
    assert extra <= 1.3 * shard


_MEASURED = """
import atexit, pathlib
from lmjax.__main__ import main
status = pathlib.Path("/proc/self/status")  # ru_maxrss would count the process that started this one, too
atexit.register(lambda: print(status.read_text().split("VmHWM:")[1].split()[0]))
main()
"""


def peak_memory(*arguments: str) -> int:
    """Bytes that a process of its own held at most."""
    process = subprocess.run([sys.executable, "-c", _MEASURED, *arguments], capture_output=True, text=True, check=True)
    return 1024 * int(process.stdout.split()[-1])
