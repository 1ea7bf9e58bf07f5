"""The command line: lmjax train, prepare, plan, evaluate, generate and others; each is a function in commands.py."""

import argparse
import difflib
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lmjax import commands
from lmjax.arguments import (
    Parser,
    Version,
    classifier_file,
    count,
    gigabytes,
    names,
    path,
    pin,
    prefix_and_tokens,
    step_range,
    whole,
    widths,
)
from lmjax.devices import flags
from lmjax.errors import ConfigError
from lmjax.names import names_in
from lmjax.process import ending, start_up

LAYOUTS = names_in("lmjax.devices.mesh", "LAYOUTS")
IN_FEWER_BITS = names_in("lmjax.generate.small", "MATRICES")
SPREAD = "how weights are spread over several devices; default: as the run's mesh says"

# Arguments --------------------------------------------------------------------------------------------------------


def parser() -> Parser:
    """All commands with their arguments."""
    main = Parser(prog="lmjax", description=__doc__.splitlines()[0])
    main.add_argument("--version", action=Version, help="print it")
    subparsers = main.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(function: Callable[[argparse.Namespace], int]) -> Parser:
        summary = (function.__doc__ or "").splitlines()[0]
        sub = subparsers.add_parser(function.__name__, help=summary, description=summary)
        sub.set_defaults(function=function)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        return sub

    _train_arguments(command(commands.train))
    _plan_arguments(command(commands.plan))
    _coordinates_arguments(command(commands.coordinates))
    _curate_arguments(command(commands.curate))
    _classifier_arguments(command(commands.classifier))
    _prepare_arguments(command(commands.prepare))
    sub = command(commands.tokenizer)
    sub.add_argument(
        "tokenizer", type=path, metavar="TOKENIZER", help="a folder tokenizer/, a .model or a tokenizer.json"
    )
    sub.add_argument("texts", nargs="+", type=path, metavar="TEXT", help="files by glob, folders, curations")
    sub.add_argument("--by", default="source", choices=["source", "language"], help="what there is a line for each of")
    sub.add_argument("--text-key", default="text", help="the field of JSON lines, the column of Parquet files")
    _evaluate_arguments(command(commands.evaluate))
    _generate_arguments(command(commands.generate))
    _convert_arguments(command(commands.convert))
    sub = command(commands.merge)
    sub.add_argument("workdir", type=path, metavar="WORKDIR", help="a run with adapters, or with frozen weights")
    sub.add_argument("--out", type=path, required=True, metavar="DIR", help="the work directory to make")
    sub.add_argument("--step", type=int, help="of the run; default: the newest checkpoint")
    sub.add_argument("--layout", choices=LAYOUTS, help=SPREAD)
    _teach_arguments(command(commands.teach))
    sub = command(commands.replay)
    sub.add_argument("workdir", type=path, metavar="WORKDIR", help="a run")
    sub.add_argument("step", type=count, metavar="STEP", help="one after a checkpoint that the run still has")
    sub = command(commands.rollback)
    sub.add_argument("workdir", type=path, metavar="WORKDIR", help="a run that is not training now")
    sub.add_argument("--to", type=count, required=True, metavar="STEP", help="of a checkpoint")
    sub.add_argument("--skip-samples", type=whole, default=0, metavar="N", help="to leave out after that step")
    sub = command(commands.inspect)
    sub.add_argument("path", help="a work directory or a checkpoint")
    sub.add_argument("--step", type=int, help="default: the newest")
    sub.add_argument("--hash", action="store_true", help="hash the contents, whatever mesh they were saved from")
    command(commands.verify).add_argument("path", help="a work directory, a checkpoint, prepared data or a curation")
    return main


def _train_arguments(sub: Parser) -> None:
    sub.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="a config file (Python code)")
    sub.add_argument("--workdir", required=True, help="where everything of this run goes")
    sub.add_argument("--dry-run", action="store_true", help="print size, FLOPs, memory and tokens, then stop")
    sub.add_argument(
        "--init-from",
        metavar="WORKDIR[@STEP]|DIR",
        help="start from the weights of another run, or of a Hugging Face directory, with a fresh optimizer; the same "
        "as --config.train.init_from",
    )
    sub.add_argument("--profile", type=step_range, metavar="FIRST:LAST", help="trace these steps with the profiler")
    sub.add_argument("--allow-config-change", action="store_true", help="resume although the config differs")
    sub.add_argument("--allow-data-change", action="store_true", help="resume although the data differ")
    several = sub.add_argument_group("several processes", "found by itself on TPUs, Slurm and SkyPilot; or all three:")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--processes", metavar="N")
    several.add_argument("--process-id", metavar="I", help="of this process, from 0")
    several.add_argument("--start-timeout", type=float, default=300, metavar="SECONDS", help="for all to meet")
    sub.epilog = (
        "any setting: --config.train.steps=100 (see docs/config.md). Many runs through one step: what they share, then "
        "after `--` what is each one's own, -- --workdir=runs/a --config.train.seed=1 -- --workdir=runs/b ..."
    )


def _teach_arguments(sub: Parser) -> None:
    sub.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="that of the students (Python code)")
    sub.add_argument("--out", type=path, required=True, metavar="DIR", help="the directory to write, or to go on with")
    sub.add_argument("--top", type=count, default=32, metavar="K", help="tokens to store at every place")
    sub.add_argument("--samples", type=count, metavar="N", help="default: those that a run of the config reads")
    sub.epilog = "any setting: --config.train.distill.teacher=runs/base (see docs/tuning.md)"


def _plan_arguments(sub: Parser) -> None:
    sub.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="a config file (Python code)")
    sub.add_argument("--topology", required=True, help="e.g. v5e-256, v5p:4x4x8, 2xv6e-256, cpu-8")
    sub.add_argument("--search", action="store_true", help="try layouts, remat policies and microbatches")
    sub.add_argument("--minutes", type=float, default=10.0, help="how long --search may compile")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.epilog = "exit code 2: it does not fit. Any setting: --config.mesh.fsdp=64 (see docs/config.md)"


def _coordinates_arguments(sub: Parser) -> None:
    sub.add_argument("config", metavar="FILE.py[:ARG]", help="a config file (Python code)")
    sub.add_argument("--widths", type=widths, default=(64, 128, 256, 512), metavar="W,W,...", help="of model.embed")
    sub.add_argument("--larger-heads", action="store_true", help="as the model gets wider, instead of more of them")
    sub.add_argument("--updates", type=count, default=10)
    sub.add_argument("--seeds", type=count, default=3)
    sub.add_argument("--out", type=path, default="coordinates.png", metavar="FILE.png", help="the figure")
    sub.epilog = "any setting: --config.model.parametrization=mup (see docs/mup.md)"


def _curate_arguments(sub: Parser) -> None:
    sub.add_argument("config", metavar="FILE.py[:ARG]", help="a recipe (Python code), such as configs/curate/books.py")
    sub.add_argument("--out", type=path, required=True, help="the directory to write")
    sub.add_argument("--workers", type=count, help="processes; default: one per CPU")
    sub.epilog = "then: lmjax prepare OUT --out=DIR (see docs/curation.md)"


def _classifier_arguments(sub: Parser) -> None:
    sub.add_argument("labelled", nargs="+", type=path, metavar="FILE", help="JSON lines, by glob: a text and a label")
    sub.add_argument("--out", type=classifier_file, required=True, metavar="NAME.classifier", help="the file to write")
    sub.add_argument("--text-key", default="text", help="the field that holds the text")
    sub.add_argument("--label-key", default="label", help="true or 1 for the kind that is looked for, false or 0")
    sub.epilog = "then: the step toxicity of lmjax curate (see docs/curation.md)"


def _prepare_arguments(sub: Parser) -> None:
    sub.add_argument(
        "inputs",
        nargs="+",
        help="files by glob (.txt .json .jsonl, each also .gz; .jsonl.zst .parquet .py), folders, or stdlib:",
    )
    sub.add_argument("--out", required=True, help="the directory to write")
    sub.add_argument("--text-key", default="text", help="the field of JSON lines, the column of Parquet files")
    sub.add_argument("--document-separator", help="splits .txt files into documents")
    sub.add_argument("--document-bytes", type=int, default=1 << 27, help="the longest document, decompressed")
    sub.add_argument("--invalid-utf8", default="error", choices=["error", "replace", "skip"])
    sub.add_argument("--normalize", default="none", choices=["none", "nfc", "nfkc"])
    sub.add_argument("--newlines", default="keep", choices=["keep", "unix"])
    sub.add_argument("--split", default="document", choices=["document", "tail"])
    sub.add_argument("--valid-fraction", type=float, default=0.05)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--shard-tokens", type=int, default=1 << 26, help="how many make a shard")
    sub.add_argument("--workers", type=int, help="processes; default: one per CPU")
    chat = sub.add_argument_group("conversations", "JSON lines, or a .json list: docs/tuning.md")
    chat.add_argument(
        "--chat",
        nargs="?",
        const="tokenizer",
        metavar="TEMPLATE",
        help="write conversations by a template: instruction, alpaca, chatml, FILE.jinja; default: the tokenizer's own",
    )
    chat.add_argument("--score", default="responses", choices=["responses", "last", "all"], help="what is learned")
    chat.add_argument("--headers", action="store_true", help="score what announces a response, too")
    chat.add_argument("--no-ends", dest="ends", action="store_false", help="do not score what closes a response")
    chat.add_argument("--longest", type=count, metavar="TOKENS", help="the most of a conversation")
    chat.add_argument("--too-long", default="error", choices=["error", "left", "right"], help="stop, or cut it there")
    tokenizer = sub.add_argument_group("tokenizer")
    kind = tokenizer.add_mutually_exclusive_group()
    kind.add_argument("--tokenizer", default="bpe", choices=["bpe", "unigram", "wordpiece", "bytes", "chars"])
    kind.add_argument("--tokenizer-file", help="a SentencePiece .model or a Hugging Face tokenizer.json instead")
    tokenizer.add_argument("--vocab", type=int, help="pieces to learn; default: 32,000")
    tokenizer.add_argument("--sample-bytes", type=int, help="text to learn them from at most; default: 100,000,000")
    tokenizer.add_argument("--endoftext", metavar="SYMBOL", help="of a --tokenizer-file: what ends a document")
    tokenizer.add_argument(
        "--unknown",
        default="error",
        choices=["error", "replace", "skip"],
        help="where a --tokenizer-file does not know a character: stop, put its unknown symbol, leave the document out",
    )


def _evaluate_arguments(sub: Parser) -> None:
    sub.add_argument("--workdir", help="a trained run")
    sub.add_argument("--step", type=int, help="default: the newest checkpoint")
    sub.add_argument("--weights", choices=IN_FEWER_BITS, help="multiply in fewer bits; --against has all of them")
    sub.add_argument(
        "--against",
        type=path,
        metavar="WORKDIR",
        help="another run, compared row by row of data, or question by question",
    )
    sub.add_argument("--data", action="append", metavar="DIR", help="prepared data set(s); default: the run's own")
    sub.add_argument("--split", default="valid", choices=["train", "valid"])
    sub.add_argument("--batch", type=count, default=16, help="rows at a time; changes speed, and what --weights rounds")
    sub.add_argument("--seq-len", type=count, help="default: as in training")
    sub.add_argument(
        "--documents",
        choices=["joined", "separate", "whole", "alone", "cut"],
        help="do they share rows: as data.documents, or each in rows of its own, or in one row, cut at its end; "
        "default: as in training, alone for a model that reads a begin symbol",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--seed", type=whole, default=1234, help="of what is drawn")
    sub.add_argument("--requests", type=path, metavar="FILE.jsonl", help="write what was said of every question")
    sub.add_argument("--page", type=path, metavar="FILE.html", help="write a page to look at, with examples")
    others = sub.add_argument_group("what is written", "in place of a prepared data set (docs/evaluation.md)")
    others.add_argument(
        "--memorized",
        type=prefix_and_tokens,
        metavar="PREFIX:TOKENS",
        help="does it go on with its training text word for word: so many tokens after so many",
    )
    others.add_argument("--texts", type=path, metavar="FILE", help="how good these texts are, whoever wrote them")
    others.add_argument("--references", type=path, metavar="FILE", help="of --texts: what people wrote, line by line")
    others.add_argument(
        "--toxicity", type=path, metavar="NAME.classifier", help="of --texts and prompts:FILE: are they toxic by it"
    )
    _benchmark_arguments(sub)


def _benchmark_arguments(sub: Parser) -> None:
    tasks = sub.add_argument_group("benchmarks", "in place of a prepared data set (docs/evaluation.md)")
    tasks.add_argument(
        "--tasks",
        type=names,
        metavar="NAME,NAME,...",
        help="as lambada,piqa,mmlu; KIND:FILE for one's own file",
    )
    tasks.add_argument("--task-data", type=path, metavar="DIR", help="where their files are")
    tasks.add_argument("--harness", type=names, metavar="NAME,NAME,...", help="tasks of lm-eval (lmjax[eval]) instead")
    tasks.add_argument("--include-path", type=path, metavar="DIR", help="of --harness: more tasks, as YAML files")
    tasks.add_argument("--shots", type=whole, metavar="N", help="examples before a question; default: the benchmark's")
    tasks.add_argument(
        "--limit",
        type=count,
        metavar="N",
        help="most questions of each, chosen by their hashes; by the harness, the first",
    )
    tasks.add_argument(
        "--perturb",
        type=names,
        metavar="NAME,NAME,...",
        help="ask the same otherwise, and compare: typos, lower, upper (case), reworded",
    )
    tasks.add_argument("--tokens", type=count, metavar="N", help="of prompts:FILE: most that are written; default: 64")
    tasks.add_argument("--temperature", type=float, help="of prompts:FILE; default: 0, the most probable tokens")


def _generate_arguments(sub: Parser) -> None:
    sub.add_argument("--workdir", required=True, help="a trained run")
    sub.add_argument("--step", type=int, help="default: the newest checkpoint")
    sub.add_argument(
        "--adapter",
        type=path,
        action="append",
        metavar="DIR",
        help="a run that stands on --workdir, or an adapter of PEFT for it; may be repeated: each of them answers",
    )
    sub.add_argument("--prompt", action="append", help="may be repeated; default: the start of a document")
    sub.add_argument("--chat", action="store_true", help="answer the prompt, by the model's chat template")
    sub.add_argument("--system", metavar="TEXT", help="with --chat: the message that stands before the prompt")
    sub.add_argument("--tokens", type=int, default=128, help="how many to generate at most")
    sub.add_argument("--temperature", type=float, help="0 is greedy, and no draw is truncated; default: 0.8")
    sub.add_argument("--top-k", type=int)
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--min-p", type=float, default=0.0)
    sub.add_argument("--repetition-penalty", type=float, default=1.0)
    sub.add_argument("--beams", type=int, default=1, help="more than 1: beam search")
    sub.add_argument("--weights", choices=IN_FEWER_BITS, help="multiply in fewer bits; default: as in training")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--ignore-endoftext", action="store_true", help="go on after the end of a document")


def _convert_arguments(sub: Parser) -> None:
    direction = sub.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from-hf", type=path, metavar="DIR", help="read a Hugging Face checkpoint into --workdir")
    direction.add_argument("--from-llama2c", type=path, metavar="FILE.bin", help="read a llama2.c model into --workdir")
    direction.add_argument(
        "--from-peft", type=path, metavar="DIR", help="read an adapter that PEFT saved into --workdir"
    )
    direction.add_argument("--to-hf", action="store_true", help="write the model of --workdir to --out")
    direction.add_argument("--to-peft", action="store_true", help="write the adapter of --workdir, for PEFT, to --out")
    sub.add_argument("--workdir", type=path, required=True, help="the work directory to make, or a trained run")
    sub.add_argument(
        "--sha256",
        type=pin,
        action="append",
        default=[],
        metavar="[FILE=]HEX",
        help="what a file that is read must have, by its name; without one, the only file of weights; may be repeated: "
        "then no file of weights is read without",
    )
    sub.add_argument("--tokenizer", metavar="FILE", help="of --from-llama2c: its vocabulary, .bin or .model")
    sub.add_argument("--base", metavar="DIR", help="of --from-peft: the run or Hugging Face directory that it is for")
    sub.add_argument("--out", metavar="DIR", help="where --to-hf and --to-peft write")
    sub.add_argument("--step", type=int, help="of the run; default: the newest checkpoint")
    sub.add_argument("--layout", choices=LAYOUTS, help=f"of --to-hf: {SPREAD}")
    sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of --to-hf's files; default: float32")
    sub.add_argument("--shard-gb", type=gigabytes, help="largest file that --to-hf writes, in 1e9 bytes; default: 5")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`--config.a.b=v` without their prefix, all other arguments); `--config.a.b v` is understood, too."""
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        setting = word.removeprefix("--config.")
        overrides.append(setting if "=" in setting else f"{setting}={next(words, '')}")
    return overrides, rest


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises ConfigError for what is not an argument, with the nearest thing that is."""
    overrides, rest = split_overrides(argv)
    main = parser()
    _check_command(rest, main)
    arguments, unknown = main.parse_known_args(rest)
    if unknown:
        raise ConfigError(f"unexpected argument '{unknown[0]}'{_hint(unknown[0], main, arguments.command)}")
    if overrides and arguments.command not in ("train", "plan", "coordinates", "teach"):
        raise ConfigError(f"lmjax {arguments.command} takes no --config.{overrides[0]}")
    arguments.overrides, arguments.words = overrides, argv
    return arguments


def split_runs(argv: Sequence[str]) -> list[list[str]]:
    """The arguments of each of the runs that stand after a `--`, `train SHARED -- RUN -- RUN`, with what they share
    before its own; of the one command where there is none."""
    shared, *own = [list(words) for separator, words in itertools.groupby(argv, "--".__eq__) if not separator] or [[]]
    if own and shared[:1] != ["train"]:
        raise ConfigError(f"`--` stands between runs of lmjax train; lmjax {' '.join(shared[:1])} takes none")
    return [[*shared, *words] for words in own] or [shared]


def _commands(main: Parser) -> dict[str, Any]:
    return main._subparsers._group_actions[0].choices  # type: ignore[union-attr, return-value]


def _check_command(words: Sequence[str], main: Parser) -> None:
    """Raises ConfigError for a first word that is none, with the nearest that is: argparse would list them all."""
    word = next((word for word in words if not word.startswith("-")), None)
    if word is not None and word not in (commands := _commands(main)):
        close = difflib.get_close_matches(word, commands, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see `lmjax --help`"
        raise ConfigError(f"there is no command '{word[:40]}'; {hint}")


def _hint(word: str, main: Parser, command: str) -> str:
    if word.startswith("config."):
        return f"; did you mean '--{word}'?"
    close = difflib.get_close_matches(word.split("=")[0], _commands(main)[command]._option_string_actions, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; see `lmjax {command} --help`"


def main() -> NoReturn:
    argv = sys.argv[1:]

    def command() -> int:
        arguments, *others = map(parse, split_runs(argv))
        if arguments.command in ("train", "evaluate", "generate") and not vars(arguments).get("dry_run"):
            start_up.tune_allocator()
            flags.set_flags()
        from lmjax.record import buckets

        buckets.register()
        if arguments.command in ("convert", "merge"):
            start_up.return_freed_memory()
        return commands.train_together([arguments, *others]) if "--" in argv else arguments.function(arguments)

    ending.run_main(command, debug="--debug" in argv)


if __name__ == "__main__":
    main()
