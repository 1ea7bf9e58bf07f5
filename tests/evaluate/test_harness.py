"""Under EleutherAI's harness: the numbers of the same weights in transformers, request by request, and its prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lm_eval")

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lmjax import __main__
from lmjax import lm_eval as lm_eval_command
from lmjax.errors import ConfigError
from lmjax.evaluate.harness import HarnessModel, _settings
from lmjax.evaluate.requests import Scorer
from lmjax.evaluate.tasks.benchmark import prompts
from lmjax.evaluate.tasks.registry import BENCHMARKS
from lmjax.hf.imported import read_checkpoint
from lmjax.models import decoder
from lmjax.run.benchmarks import scorer as scorer_of_run
from lmjax.run.lm_eval_model import WorkDirectory
from lmjax.run.trained import load_trained

TOLERANCE = 1e-4  # nats per request

WORDS = ["dog", "little girl named Lily", "big red ball", "park", "sun", "old man", "cat", "happy boy"]
NAMES = ["Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue"]
STORIES = [
    f'One day, {name} saw a {word}. {name} said, "Hello!" and ran to' for name, word in zip(NAMES, WORDS, strict=True)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up questions in the files and fields of our benchmarks, and the harness's tasks for them."""
    folder = tmp_path_factory.mktemp("harness")
    quiz = [
        {"query": f"Question: What did {name} see?", "choices": WORDS[n % 5 : n % 5 + 4], "gold": n % 4}
        for n, name in enumerate(NAMES)
    ]
    exams = [
        {
            "subject": "high_school_parks",
            "question": f" Who is {name}? ",
            "choices": WORDS[n % 5 : n % 5 + 4],
            "answer": n % 4,
        }
        for n, name in enumerate(NAMES)
    ]
    cloze = [{"context": story, "continuation": "the park" if n % 2 else "the"} for n, story in enumerate(STORIES)]
    texts = [{"text": " ".join(STORIES[: n + 1]) * 3} for n in range(5)]
    for name, records in {
        "arc_easy.jsonl": quiz,
        "mmlu_dev.jsonl": exams[:4],
        "mmlu_validation.jsonl": exams[4:],
        "cloze.jsonl": cloze,
        "texts.jsonl": texts,
    }.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    exam = "{{question.strip()}}" + "".join(f"\n{letter}. {{{{choices[{n}]}}}}" for n, letter in enumerate("ABCD"))
    accuracy = [{"metric": "acc"}, {"metric": "acc_norm"}]
    tasks: dict[str, dict[str, Any]] = {
        "our_arc": {
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": "test",
            "doc_to_text": "{{query}}\nAnswer:",
            "doc_to_target": "gold",
            "doc_to_choice": "{{choices}}",
            "metric_list": accuracy,
            "dataset_kwargs": {"data_files": {"test": str(folder / "arc_easy.jsonl")}},
        },
        "our_mmlu": {
            "output_type": "multiple_choice",
            "description": "The following are multiple choice questions (with answers) about high school parks.\n\n",
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "doc_to_text": f"{exam}\nAnswer:",
            "doc_to_target": "answer",
            "doc_to_choice": ["A", "B", "C", "D"],
            "metric_list": accuracy,
            "dataset_kwargs": {
                "data_files": {
                    "test": str(folder / "mmlu_validation.jsonl"),
                    "dev": str(folder / "mmlu_dev.jsonl"),
                }
            },
        },
        "our_cloze": {
            "output_type": "loglikelihood",
            "test_split": "test",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
            "dataset_kwargs": {"data_files": {"test": str(folder / "cloze.jsonl")}},
        },
        "our_texts": {
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
            "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        },
        "our_endings": {
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{continuation}}",
            "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
            "dataset_kwargs": {"data_files": {"test": str(folder / "cloze.jsonl")}},
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "dataset_path": "json", **task}))
    return folder


TASKS = ["our_arc", "our_mmlu", "our_cloze", "our_texts", "our_endings"]


def answers(model: Any, data: Path, tasks: list[str] = TASKS, **options: Any) -> dict[str, list[dict[str, Any]]]:
    manager = TaskManager(include_path=str(data), include_defaults=False)
    found = simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    return {name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in tasks}


@pytest.fixture(scope="module")
def scorer(stories: Path) -> Scorer:
    trained = load_trained(stories)
    return Scorer(trained.scorer, trained.params, trained.tokenizer, context=128, batch=8)


def same_numbers(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """Compare the responses to each request, and count them."""
    compared = 0
    for name, expected in theirs.items():
        for mine, other in zip(ours[name], expected, strict=True):
            assert mine["arguments"] == other["arguments"]
            for (got,), (wanted,) in zip(mine["resps"], other["resps"], strict=True):
                if name == "our_endings":
                    # transformers decodes the new tokens as a text of their own, whose first space is taken away
                    assert got.removeprefix(" ") == wanted and wanted
                elif name == "our_texts":
                    # of a whole text the harness adds up in float32
                    assert float(got) == pytest.approx(float(wanted), abs=TOLERANCE, rel=1.2e-7)
                else:
                    assert float(got[0]) == pytest.approx(float(wanted[0]), abs=TOLERANCE)
                    assert str(got[1]) == str(wanted[1])
                compared += 1
    return compared


def test_the_numbers_of_transformers(scorer: Scorer, exported_stories: Path, data: Path) -> None:
    """The same weights and tokenizer under the harness's own model class; texts longer than what is read, too."""
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(str(exported_stories), device="cpu", dtype="float32", batch_size=4, max_length=128, backend="causal")
    compared = same_numbers(answers(HarnessModel(scorer), data), answers(theirs, data))
    assert compared == 8 * 4 + 4 * 4 + 8 + 5 + 8


@pytest.mark.parametrize("family", ["gpt2", "qwen3", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_the_numbers_of_an_imported_model(
    family: str, scorer: Scorer, exported_stories: Path, data: Path, tmp_path: Path
) -> None:
    """Random weights that transformers has written."""
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from tests.hf.test_families import CASES, random_model

    kind, settings = CASES[family]
    model = random_model(kind, {**settings, "vocab_size": scorer.tokenizer.vocab_size})
    model.save_pretrained(tmp_path)
    imported = read_checkpoint(tmp_path)
    ours = scorer._replace(model=decoder.build(imported.model), params=imported.params)
    theirs = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(exported_stories), batch_size=4, max_length=128)
    tasks = ["our_arc", "our_cloze", "our_texts"]
    compared = same_numbers(answers(HarnessModel(ours), data, tasks), answers(theirs, data, tasks))
    assert compared == 8 * 4 + 8 + 5


@pytest.mark.parametrize(
    ("task", "name", "examples"), [("our_arc", "arc_easy", None), ("our_mmlu", "mmlu", "mmlu_dev.jsonl")]
)
@pytest.mark.parametrize("seed", [1234, 5])
def test_prompts_with_examples_are_the_harness_s(
    scorer: Scorer, data: Path, task: str, name: str, examples: str | None, seed: int
) -> None:
    """Byte for byte: drawn from the other questions, and the first ones of another file."""
    benchmark = BENCHMARKS[name]._replace(file=BENCHMARKS[name].file.removesuffix(".gz"), examples=examples)
    mine = [
        (prompt.context, text)
        for prompt in prompts(benchmark, data, shots=3, seed=seed)
        for text in prompt.continuations
    ]
    found = answers(HarnessModel(scorer), data, [task], num_fewshot=3, fewshot_random_seed=seed)[task]
    theirs = [tuple(one) for sample in found for one in sample["arguments"]]
    assert len(mine) > 10 and mine == theirs
    assert all(context.count("\nAnswer: ") == 3 for context, _ in mine)


def test_the_command(stories: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def evaluate(*more: str) -> str:
        arguments = [f"--workdir={stories}", "--harness=our_arc", f"--include-path={data}", "--limit=5"]
        parsed = __main__.parse(["evaluate", *arguments, *more])
        assert parsed.function(parsed) == 0
        return capsys.readouterr().out

    shown = evaluate().splitlines()
    assert shown[0].split() == ["task", "metric", "value", "+-", "items"]
    found = json.loads(evaluate("--json", f"--requests={tmp_path / 'said.jsonl'}"))
    assert found["n-samples"]["our_arc"]["effective"] == 5
    records = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    accuracy = sum(record["acc"] for record in records) / 5
    assert found["results"]["our_arc"]["acc,none"] == pytest.approx(accuracy) and len(records) == 5
    assert ["our_arc", "acc", f"{accuracy:.4f}"] in [line.split()[:3] for line in shown]
    with pytest.raises(ConfigError, match="has no task 'our_ark'"):
        arguments = __main__.parse(["evaluate", f"--workdir={stories}", "--harness=our_ark", f"--include-path={data}"])
        arguments.function(arguments)


def test_the_harness_s_own_command(
    stories: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`python -m lmjax.lm_eval` reads and writes what `lm_eval` does, and says what `lmjax evaluate --harness` says."""
    asked = ["--tasks", "our_arc", "--include_path", str(data), "--limit", "5", "--log_samples"]
    model = ["--model", "lmjax", "--model_args", f"workdir={stories}", "--batch_size", "8"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *model, *asked, "--output_path", str(tmp_path)])
    lm_eval_command.main()
    assert "|our_arc|" in capsys.readouterr().out
    (written,) = tmp_path.rglob("samples_our_arc_*.jsonl")
    samples = {sample["doc_id"]: sample for sample in map(json.loads, written.read_text().splitlines())}
    ours = answers(HarnessModel(scorer_of_run(load_trained(stories), batch=8)), data, ["our_arc"], limit=5)["our_arc"]
    assert len(ours) == 5
    for one in ours:
        theirs = samples[one["doc_id"]]["filtered_resps"]
        assert [float(x) for x, _ in theirs] == pytest.approx([x for x, _ in one["filtered_resps"]], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, r"workdir=DIR is missing"), ({"workdir": "x", "dtype": "bfloat16"}, "--model_args dtype: lmjax reads")],
)
def test_model_args_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkDirectory(**arguments)


def test_how_a_task_wants_to_be_written() -> None:
    cfg, stop = _settings({"until": "\n", "max_gen_toks": 7})
    assert (cfg.tokens, cfg.temperature, stop) == (7, 0.0, ("\n",))
    cfg, stop = _settings({"until": ["a", "b"], "do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert (cfg.tokens, cfg.temperature, cfg.top_p, stop) == (256, 0.5, 0.9, ("a", "b"))
    with pytest.raises(ConfigError, match=r"generation_kwargs\.num_beams of a task is not known"):
        _settings({"until": [], "num_beams": 3})


def test_the_adapter_imports_no_torch() -> None:
    program = "import sys, lmjax.evaluate.harness; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
