"""The commands that make data, from raw documents to tokens, and that tell what a tokenizer makes of texts."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from lmjax.errors import ConfigError, DataError, visible
from lmjax.process import ending

if TYPE_CHECKING:
    from lmjax.data.curate.document import Document


def curate(arguments: argparse.Namespace) -> int:
    """Clean a corpus: its documents through the steps of a recipe, with a page that shows what became of them."""
    from lmjax.config import ConfigFile
    from lmjax.data.curate.curate import curate
    from lmjax.data.curate.recipe import CurateConfig
    from lmjax.schema import validated

    given = {} if arguments.workers is None else {"workers": arguments.workers}
    cfg = validated(CurateConfig, ConfigFile(arguments.config).tree().to_dict() | given, "config.")
    print("\n".join(curate(cfg, arguments.out).lines()))
    print(f"{arguments.out}: curation.html shows what was dropped and why")
    return 0


def classifier(arguments: argparse.Namespace) -> int:
    """Learn to tell texts of one kind, such as toxic ones, from others, and keep what was learned in a file."""
    from lmjax.data.curate.classifier import save_classifier
    from lmjax.data.curate.labelled import Labelled
    from lmjax.schema import validated

    fields = {field.name for field in dataclasses.fields(Labelled)}
    cfg = validated(Labelled, {name: value for name, value in vars(arguments).items() if name in fields})
    learned, facts = cfg.learn([*cfg.examples()])
    save_classifier(learned, arguments.out)
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    return 0


def prepare(arguments: argparse.Namespace) -> int:
    """Turn text, or conversations, into a directory of token shards."""
    from lmjax.data.config import ChatConfig, PrepareConfig
    from lmjax.data.prepare.prepare import prepare
    from lmjax.schema import validated

    tokenizer = {
        "kind": "file" if arguments.tokenizer_file else arguments.tokenizer,
        "path": arguments.tokenizer_file,
        "endoftext": arguments.endoftext,
    }
    learned = {"vocab": arguments.vocab, "sample_bytes": arguments.sample_bytes}
    learned = {name: value for name, value in learned.items() if value is not None}
    if learned and tokenizer["kind"] in ("bytes", "chars", "file"):
        raise ConfigError("--vocab and --sample-bytes are of pieces that are learned; this tokenizer has its own")
    tokenizer |= learned
    fields = {field.name for field in dataclasses.fields(PrepareConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in fields} | {"tokenizer": tokenizer}
    chat = ChatConfig(
        **{
            field.name: getattr(arguments, field.name)
            for field in dataclasses.fields(ChatConfig)
            if field.name != "template"
        }
    )
    if arguments.chat is not None:
        given["chat"] = dataclasses.asdict(chat) | {"template": arguments.chat}
    elif chat != ChatConfig():
        raise ConfigError("--score, --headers, --no-ends, --longest and --too-long are of conversations: add --chat")
    manifest = prepare(validated(PrepareConfig, given), arguments.out)
    for name, split in manifest.splits.items():
        if split.scored_tokens is None:
            print(f"{name}: {split.documents:,} documents, {split.text_bytes:,} bytes, {split.tokens:,} tokens")
        else:
            print(f"{name}: {split.documents:,} conversations, {split.tokens:,} tokens, {split.scored_tokens:,} scored")
    print(f"{arguments.out}: fingerprint {manifest.fingerprint}")
    if arguments.chat is not None:
        _show_example(arguments.out)
    return 0


def tokenizer(arguments: argparse.Namespace) -> int:
    """What a tokenizer makes of texts: bytes per token, unknown tokens, round trips, use of the vocabulary."""
    from lmjax.data.config import PrepareConfig
    from lmjax.data.curate.result import read_documents
    from lmjax.data.tokenizers import report
    from lmjax.data.tokenizers.load import load_tokenizer

    loaded = load_tokenizer(arguments.tokenizer)
    cfg = PrepareConfig(text_key=arguments.text_key, invalid_utf8="replace")
    group = _GROUPS[arguments.by]()
    documents = (one for pattern in arguments.texts for one in read_documents(pattern, cfg))
    usages = report.measure(loaded, ((group(document), document.text) for document in documents))
    if not usages:
        raise DataError(f"no text in {', '.join(arguments.texts)}: every document is empty")
    print(visible("\n".join(report.lines(loaded, usages))))
    return 0


def teach(arguments: argparse.Namespace) -> int:
    """Store the likeliest next tokens that a teacher sees in the samples of a run, to distill from them without it."""
    from lmjax import config
    from lmjax.process import start_up

    cfg = config.load(arguments.config, arguments.overrides)
    start_up.configure_jax()
    from lmjax.finetune.teach import teach
    from lmjax.record.files import locate

    with ending.within_memory("train.batch, data.seq_len or train.loss.chunk"):
        manifest = teach(cfg, locate(arguments.out), top=arguments.top, samples=arguments.samples)
    print(f"{arguments.out}: {manifest.samples:,} samples; train with --config.train.distill.stored={arguments.out}")
    return 0


def _by_source() -> Callable[["Document"], str]:
    return lambda document: document.source


def _by_language() -> Callable[["Document"], str]:
    """As a curation has labelled the document, or as the step `language` would."""
    from lmjax.data.curate.language import identifier

    language_of = identifier()
    return lambda document: document.labels.get("language") or language_of(document.text)[0]


_GROUPS = {"source": _by_source, "language": _by_language}


def _show_example(path: str) -> None:
    from lmjax.data.chat.show import shown
    from lmjax.data.store.dataset import open_dataset

    dataset, colour = open_dataset(path), sys.stdout.isatty()
    how = "in colour" if colour else "between >> and <<"
    print(f"--- the first conversation, what is scored {how}")
    print(shown(dataset.split("train"), dataset.tokenizer(), colour=colour))
