"""A Llama that others trained, with a published story: imported by the command, it writes the same one."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax import __main__
from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.prepare.prepare import prepare
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate, stream
from lmjax.run.trained import load_trained
from tests.conftest import STORIES


def run(command: str, **options: Any) -> int:
    arguments = __main__.parse([command, *(f"--{name}={value}" for name, value in options.items())])
    return arguments.function(arguments)


def reference() -> dict[str, Any]:
    return json.loads((STORIES / "reference.json").read_text())


def test_the_published_story_is_written_again(stories: Path, capsys: pytest.CaptureFixture) -> None:
    trained = load_trained(stories)
    ids = np.load(STORIES / "reference_logits.npz")["greedy_ids"].tolist()
    greedy = GenerateConfig(tokens=200, temperature=0)
    (one,) = generate(trained.model, trained.params, trained.tokenizer, [""], greedy)
    assert [trained.tokenizer.begin_id, *one.ids] == ids
    assert one.text == reference()["greedy_text"] and not one.finished
    pieces = list(stream(trained.model, trained.params, trained.tokenizer, "", greedy))
    assert "".join(pieces) == one.text and len(pieces) > 10
    capsys.readouterr()
    run("generate", workdir=stories, tokens=200, temperature=0)
    assert capsys.readouterr().out == one.text + "\n"


def test_logits_are_those_of_the_reference(stories: Path) -> None:
    trained, arrays = load_trained(stories), np.load(STORIES / "reference_logits.npz")
    assert [trained.tokenizer.begin_id, *trained.tokenizer.encode(reference()["prompt"])] == reference()["prompt_ids"]
    for ids, logits in (("greedy_ids", "logits_first64"), ("prompt_ids", "prompt_logits")):
        found = trained.model.logits(trained.params, arrays[ids][None, : len(arrays[logits])])[0]
        np.testing.assert_allclose(found, arrays[logits], atol=1e-4)


def test_the_mean_loss_is_that_of_the_reference(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = STORIES.parents[1] / "tinystories" / "stories.jsonl.gz"
    file = TokenizerConfig(kind="file", path=str(stories / "tokenizer"))
    first = tmp_path / "stories.jsonl"
    with gzip.open(texts, "rt") as lines:
        first.write_text("".join(line for line, _ in zip(lines, range(100), strict=False)))
    recipe = PrepareConfig(inputs=(str(first),), tokenizer=file, valid_fraction=0.0, workers=1)
    prepare(recipe, tmp_path / "data", progress=False)
    capsys.readouterr()
    options = {"seq-len": 511, "documents": "cut", "split": "train", "batch": 25}
    run("evaluate", workdir=stories, data=tmp_path / "data", **options)
    out = capsys.readouterr().out
    assert f"(train, {reference()['tokens']:,} tokens)" in out and "coverage       0.993408" in out
    loss = float(out.split("  loss ")[1].split()[0])
    assert abs(loss - reference()["mean_nll_per_token"]) < 1e-5


def test_transformers_tells_the_same_story(exported_stories: Path) -> None:
    """Exported, with its tokenizer: the published story by `model.generate`."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported_stories)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported_stories)
    ids = tokenizer("", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[1]]
    with torch.no_grad():
        written = model.generate(ids, do_sample=False, max_new_tokens=200, eos_token_id=None, pad_token_id=0)
    assert written[0].tolist() == np.load(STORIES / "reference_logits.npz")["greedy_ids"].tolist()
    assert tokenizer.decode(written[0], skip_special_tokens=True).strip() == reference()["greedy_text"].strip()
    assert tokenizer(reference()["prompt"])["input_ids"] == reference()["prompt_ids"]
