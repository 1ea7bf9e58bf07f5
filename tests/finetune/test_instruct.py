"""Instruction tuning: resumed to the bit, weighed to the token, the same whether conversations share a row or not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lmjax import config as configs
from lmjax.__main__ import parse
from lmjax.data.store.dataset import open_dataset
from lmjax.data.tokenizers.load import load_tokenizer
from lmjax.devices.place import local_rows
from lmjax.errors import DONE, ConfigError, DataError
from lmjax.finetune.instruct import instruct
from lmjax.hf.tokenizer_files import tokenizer_files
from lmjax.process import faults as fault_hooks
from lmjax.record.inspect import inspect
from lmjax.record.ledger import check_ledger, effective_history
from lmjax.record.tracking import read_events, read_jsonl
from lmjax.run import assemble, run
from lmjax.run.trained import Trained, evaluate_trained, load_trained
from lmjax.train.step import accumulate, sample_keys
from tests.data.chat.test_scoring import byte_level
from tests.finetune.lessons import CONFIG, SETTINGS, settings, tiny

pytest.importorskip("jinja2")
pytestmark = pytest.mark.usefixtures("quick_compilation", "compile_cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the prepared lessons and a finished run."""
    place = tmp_path_factory.mktemp("instruct")
    assert run.run(tiny(place), place / "run", run.Options()) == DONE
    return place


@pytest.fixture(scope="module")
def trained(place: Path) -> Trained:
    return load_trained(place / "run")


def test_a_killed_run_ends_with_the_same_bits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "lmjax", "train", f"--config={CONFIG}", f"--workdir={place / 'killed'}"]
    flags = [f"--config.{setting}" for setting in settings(place)]
    killed = subprocess.run([*command, *flags], env=os.environ | {"LMJAX_FAULTS": "kill@step:7"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr(fault_hooks, "_calls", {})
    assert run.run(tiny(place), place / "killed", run.Options()) == DONE
    whole, resumed = (inspect(place / name, hashes=True) for name in ("run", "killed"))
    assert whole["hashes"] == resumed["hashes"] and whole["step"] == resumed["step"] == 8
    histories = [effective_history(place / name / "ledger.jsonl") for name in ("run", "killed")]
    assert [one.data for one in histories[0]] == [one.data for one in histories[1]] and len(histories[0]) == 8
    assert check_ledger(place / "killed" / "ledger.jsonl") == []


def test_it_learns_to_respond_and_says_what_was_scored(place: Path) -> None:
    rows = read_jsonl(place / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    scores = [row["val/lessons/loss"] for row in rows if "val/lessons/loss" in row]
    assert losses[-1] < 0.8 * losses[0] and scores[-1] < scores[0]
    assert all(0 < row["train/scored"] < 0.6 for row in rows if "train/scored" in row)
    [start] = [event for event in read_events(place / "run" / "metrics.jsonl") if event["event"] == "start"]
    dataset = open_dataset(place / "lessons")
    counted = {name: dataset.split(name).n_scored for name in ("train", "valid")}  # type: ignore[arg-type]
    assert start["scored"] == {"lessons": counted} and start["template"] == dataset.manifest.template_hash
    sample = (place / "run" / "samples" / "8.txt").read_text()
    assert sample.startswith("What is the opposite of hot?\n") and "\n\nWhat is 5 plus 4?\n" in sample


def test_the_run_is_evaluated_and_asked_as_it_was_trained(
    place: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss is that of responses alone, whoever measures it, and its answer is to what the template makes."""
    said = json.loads((place / "run" / "summary.json").read_text())
    [found] = evaluate_trained(trained, [str(place / "lessons")], split="valid", batch=3, seq_len=192).values()
    np.testing.assert_allclose(found.loss, said["val_full/lessons/loss"], rtol=1e-5)
    content = open_dataset(place / "lessons").split("valid")
    assert found.tokens == content.n_scored and found.coverage == 1.0
    with pytest.raises(ConfigError, match="--documents=alone would score all; leave it out"):
        evaluate_trained(trained, [str(place / "lessons")], split="valid", batch=3, seq_len=192, documents="alone")
    np.testing.assert_allclose(found.bits_per_byte, found.loss * found.tokens / content.n_bytes / np.log(2), rtol=1e-6)
    words = ["generate", f"--workdir={place / 'run'}", "--chat", "--temperature=0", "--tokens=4"]
    arguments = parse([*words, "--prompt=What is 5 plus 4?"])
    assert arguments.function(arguments) == 0
    ids = list(b"[instruction]\nWhat is 5 plus 4?[end]\n[response]\n")
    for _ in range(4):
        logits_BTV = trained.scorer.logits(trained.params, jnp.array([ids]))
        ids.append(int(logits_BTV[0, -1].argmax()))
    spelled = trained.tokenizer.decode_bytes(ids[-4:]).split(b"<|endoftext|>")[0].decode(errors="replace")
    assert capsys.readouterr().out == spelled + "\n"


def test_what_is_exported_asks_in_the_same_words(place: Path, trained: Trained, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    beside = {name: (place / "run" / "tokenizer" / name).read_bytes() for name in ("chat_template.jinja",)}
    for name, content in tokenizer_files(trained.tokenizer, beside, 256).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = theirs.apply_chat_template(
        [{"role": "user", "content": "Spell é."}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert asked["input_ids"] == list("[instruction]\nSpell é.[end]\n[response]\n".encode())


def alone(trained: Trained, split: Any) -> tuple[float, int]:
    """(-log p of all that is scored, how many tokens that is), each conversation by itself, from its logits."""
    total = count = 0.0
    longest = int(np.diff(split.document_starts).max())
    for start, end in zip(split.document_starts[:-1], split.document_starts[1:], strict=True):
        where = np.array([start]), np.array([end - start])
        ids, scored = split.take(*where).astype(np.int32), split.weights(*where) > 0
        tokens_BT = np.pad(ids, (0, longest - len(ids)))[None]  # of one shape; what follows is not seen
        logp_TV = jax.nn.log_softmax(trained.scorer.logits(trained.params, tokens_BT)[0])
        logp_T = np.asarray(logp_TV, np.float64)[np.arange(len(ids) - 1), ids[1:]]
        total -= float(logp_T[scored[1:]].sum())
        count += int(scored[1:].sum())
    return total, int(count)


def test_company_in_a_row_changes_nothing(place: Path, trained: Trained) -> None:
    split = open_dataset(place / "lessons").split("valid")
    assert len(open_dataset(place / "lessons").split("valid").document_starts) > 10
    total, count = alone(trained, split)
    for seq_len in (192, 500):
        [found] = evaluate_trained(trained, [str(place / "lessons")], split="valid", batch=2, seq_len=seq_len).values()
        assert found.tokens == count
        np.testing.assert_allclose(found.loss, total / count, rtol=2e-5)


def test_accumulation_over_ragged_masks_is_exact(place: Path) -> None:
    """However unevenly responses are spread over microbatches, the gradient is that of the whole batch."""
    experiment = assemble.assemble(instruct(tiny(place)))
    state = assemble.initial_state(experiment)
    assert experiment.task.source is not None
    batch = next(iter(experiment.task.source(rows=local_rows(None, 4), at=0)))
    weights_B = batch.weights_BT.sum(axis=1)
    assert len(set(weights_B.tolist())) > 2 and experiment.task.objective.weight(batch) == weights_B.sum()
    keys_B = sample_keys(state.hyper["seed"], batch.ids_B)

    def gradient(microbatches: int) -> Any:
        objective = experiment.task.objective
        return jax.jit(lambda state, batch: accumulate(objective, state, {}, batch, keys_B, microbatches))(state, batch)

    (whole, metrics), (pieces, again) = gradient(1), gradient(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max())), whole, pieces)
    for name, (total, weight) in metrics.items():
        np.testing.assert_allclose(again[name], (total, weight), rtol=1e-6)
    assert metrics["loss"][1] == weights_B.sum() and metrics["scored"][1] == batch.weights_BT.size


def test_a_run_goes_on_from_a_base(place: Path, tmp_path: Path) -> None:
    """With its sizes, its tokenizer and its weights, and data prepared anew."""
    sizes = ("model.", "train.microbatches", "data.sources")
    given = [one for one in SETTINGS if not one.startswith(sizes)]
    cfg = configs.load(f"{CONFIG}:{place / 'run'}", [*given, f"data.sources.lessons.path={tmp_path / 'data'}"])
    assert run.run(cfg, tmp_path / "run", run.Options()) == DONE
    first, then = (read_jsonl(path / "run" / "metrics.jsonl") for path in (place, tmp_path))
    begun, ended = first[0]["train/loss"], [row["train/loss"] for row in first if "train/loss" in row][-1]
    assert then[0]["train/loss"] < ended + 0.3 * (begun - ended)


def test_a_symbol_that_ends_a_turn_ends_an_answer(place: Path, tmp_path: Path) -> None:
    """The tokenizer of the work directory stops there, and so does what generates by it; words do not stop it."""
    library = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    recipe = "data.sources.lessons.prepare"
    cfg = tiny(
        tmp_path,
        f"{recipe}.tokenizer.kind=file",
        f"{recipe}.tokenizer.path={tmp_path / 'tokenizer.json'}",
        f"{recipe}.chat.template=chatml",
        "train.sample.prompts=()",
    )
    task = instruct(cfg)
    task.write_files(epath.Path(tmp_path / "run"))
    assert task.sample is None
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    named = [library.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")]
    assert list(tokenizer.stop_ids) == named
    assert load_tokenizer(place / "run" / "tokenizer").stop_ids == ()


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (
            ("data.documents=separate",),
            ConfigError,
            "task=instruct reads conversations whole: set data.documents=whole",
        ),
        (("train.sample.prompts=('',)",), ConfigError, "train.sample.prompts: an empty one asks for nothing"),
        (("data.seq_len=60",), DataError, r"lessons: document \d+ has \d+ tokens, and .* a row holds 61: raise"),
        (("task=pretrain", "data.documents=joined"), DataError, "holds conversations, of which only some tokens are"),
    ],
)
def test_what_does_not_fit_is_named_before_a_step(
    place: Path, tmp_path: Path, more: tuple[str, ...], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run.run(tiny(place, *more), tmp_path / "run", run.Options())
    assert "\n" not in str(caught.value)


def test_data_of_other_kinds_are_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text of no conversation " * 20)
    texts = ["prepare", str(tmp_path / "a.txt"), f"--out={tmp_path / 'texts'}", "--tokenizer=bytes", "--workers=1"]
    lessons = CONFIG.with_name("instructions.jsonl")
    other = [
        "prepare",
        str(lessons),
        f"--out={tmp_path / 'other'}",
        "--tokenizer=bytes",
        "--workers=1",
        "--chat=chatml",
    ]
    for words in (texts, other):
        arguments = parse(words)
        assert arguments.function(arguments) == 0
    tree = configs.as_config_dict(tiny(place))
    for name, message in (
        ("texts", "data.sources.more: .*texts holds texts, not conversations; give its recipe prepare.chat"),
        ("other", "data.sources.more and data.sources.lessons were written by different chat templates"),
    ):
        with tree.unlocked():
            tree.data.sources = {
                "lessons": configs.as_config_dict(tiny(place).data.sources["lessons"]),
                "more": {"path": str(tmp_path / name)},
            }
        with pytest.raises(DataError, match=message):
            instruct(configs.parse(tree.to_dict()))
