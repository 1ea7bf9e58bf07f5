"""The commands. Each reads its arguments and calls the library.

Heavy imports wait until a command needs them, so that `--help` and a mistyped argument answer at once.
"""

import argparse
import shlex
import sys

Arguments = argparse.Namespace


def train(arguments: Arguments) -> int:
    """Train a config in a work directory, or go on where an earlier attempt stopped. Finished: does nothing."""
    from lmjax import config

    cfg = config.load(arguments.config, arguments.overrides)
    from lmjax import run

    if arguments.dry_run:
        run.print_plan(cfg)
        return 0
    options = run.Options(
        profile=arguments.profile,
        allow_config_change=arguments.allow_config_change,
        allow_data_change=arguments.allow_data_change,
        command=shlex.join(["lmjax", *sys.argv[1:]]),
    )
    return run.run(cfg, arguments.workdir, options)


def prepare(arguments: Arguments) -> int:
    """Turn text into a directory of token shards."""
    from lmjax.data.config import PrepareConfig, TokenizerConfig
    from lmjax.data.prepare import prepare

    tokenizer = TokenizerConfig(
        kind="file" if arguments.tokenizer_file else arguments.tokenizer,
        path=arguments.tokenizer_file,
        vocab=arguments.vocab,
    )
    recipe = PrepareConfig(
        inputs=tuple(arguments.inputs),
        tokenizer=tokenizer,
        text_key=arguments.text_key,
        document_separator=arguments.document_separator,
        invalid_utf8=arguments.invalid_utf8,
        normalize=arguments.normalize,
        newlines=arguments.newlines,
        split=arguments.split,
        valid_fraction=arguments.valid_fraction,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    prepare(recipe, arguments.out)
    return 0


def evaluate(arguments: Arguments) -> int:
    """Loss, perplexity, bits per byte and accuracy of a trained model on a prepared data set."""
    from lmjax import commands

    return commands.evaluate(arguments)


def generate(arguments: Arguments) -> int:
    """Text from a trained model."""
    from lmjax import commands

    return commands.generate(arguments)


def inspect(arguments: Arguments) -> int:
    """What a checkpoint holds."""
    from lmjax import checkpoint

    print(checkpoint.format_inspection(checkpoint.inspect(arguments.path, step=arguments.step, hashes=arguments.hash)))
    return 0


def verify(arguments: Arguments) -> int:
    """Hash every file of a run's checkpoints, or of a prepared data set, against its manifest."""
    from lmjax import commands

    return commands.verify(arguments)
