"""The commands. Each reads its arguments and calls the library.

Heavy imports wait until a command needs them, so that `--help` and a mistyped argument answer at once.
"""

import argparse
import dataclasses
import functools
import json
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmjax.command_data import classifier as classifier
from lmjax.command_data import curate as curate
from lmjax.command_data import prepare as prepare
from lmjax.command_data import teach as teach
from lmjax.command_data import tokenizer as tokenizer
from lmjax.command_evaluate import evaluate as evaluate
from lmjax.command_generate import generate as generate
from lmjax.errors import CheckpointError, ConfigError, StallError, visible
from lmjax.process import ending

if TYPE_CHECKING:
    from lmjax.run.run import Options

Arguments = argparse.Namespace


def train(arguments: Arguments) -> int:
    """Train a config in a work directory, or go on where an earlier attempt stopped. Finished: does nothing."""
    from lmjax.process import start_up

    with start_up.importing():
        from lmjax import config

        cfg = config.load(arguments.config, _train_overrides(arguments))
        start_up.configure_jax()  # which imports JAX: what is wrong with the config is known by now
        start_up.keep_to_owner()
        if arguments.dry_run:
            from lmjax.run import dry_run

            for line in dry_run.describe(cfg):
                print(line)
            return 0
        ending.leave_on_sigterm()
        from lmjax.process import group
        from lmjax.run import run

    flags = {
        "LMJAX_COORDINATOR": arguments.coordinator,
        "LMJAX_PROCESSES": arguments.processes,
        "LMJAX_PROCESS_ID": arguments.process_id,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    on_loss = functools.partial(ending.exit_now, code=StallError.exit_code)
    group.start(os.environ | given, timeout=arguments.start_timeout, on_loss=on_loss)
    with group.naming_lost_peers("training"), ending.within_memory("train.batch, data.seq_len or the model's size"):
        code = run.run(cfg, arguments.workdir, _train_options(arguments))
    group.finish()
    return code


def train_together(runs: Sequence[Arguments]) -> int:
    """Train many configs at once through one step, each in its own work directory as `train` does."""
    from lmjax import config
    from lmjax.process import cluster, start_up

    for flag in ("dry_run", "profile", "coordinator", "processes", "process_id"):
        if any(getattr(one, flag) for one in runs):
            raise ConfigError(f"{_flag(flag)} is of one run alone; leave it out, or name no runs after `--`")
    place = cluster.detect(os.environ)
    if place is not None and place.processes > 1:
        raise ConfigError(f"runs that train together need one process, this is one of {place.processes}; start one")
    cfgs = [config.load(one.config, _train_overrides(one)) for one in runs]
    start_up.configure_jax()
    start_up.keep_to_owner()
    ending.leave_on_sigterm()
    from lmjax.run import stack
    from lmjax.run.workdir import locate

    return stack.train(
        [stack.Member(cfg, locate(one.workdir), _train_options(one)) for cfg, one in zip(cfgs, runs, strict=True)]
    )


def _train_overrides(arguments: Arguments) -> list[str]:
    start = [] if arguments.init_from is None else [f"train.init_from={arguments.init_from}"]
    return [*arguments.overrides, *start]


def _train_options(arguments: Arguments) -> "Options":
    from lmjax.run.run import Options

    return Options(
        profile=arguments.profile,
        allow_config_change=arguments.allow_config_change,
        allow_data_change=arguments.allow_data_change,
        command=shlex.join(["lmjax", *arguments.words]),
    )


def plan(arguments: Arguments) -> int:
    """Compile the train step for hardware that is not here: memory, FLOPs, network, time, price."""
    from lmjax import config
    from lmjax.plan import topology

    target = topology.parse(arguments.topology)
    cfg = config.load(arguments.config, arguments.overrides)
    topology.prepare_process(target)

    from lmjax.plan import search, step, table
    from lmjax.run import dry_run

    devices = topology.devices(target)
    cfg = dry_run.with_known_vocab(cfg)
    if arguments.search:
        found = search.search(cfg, target, devices, seconds=60 * arguments.minutes)
        print(json.dumps(table.search_as_json(found), indent=1) if arguments.json else table.search_text(found))
        if not found.plans:
            raise ConfigError(
                f"--topology={target.name}: nothing that was tried fits; use more chips, or search for more --minutes"
            )
        return 0
    planned = step.make_plan(cfg, target, devices)
    print(json.dumps(table.as_json(planned), indent=1) if arguments.json else "\n".join(table.lines(planned)))
    if not planned.fits:
        raise ConfigError(
            f"--topology={target.name}: {table.verdict(planned)}; --search tries other layouts, remat policies and "
            "microbatches; or use more chips"
        )
    return 0


def coordinates(arguments: Arguments) -> int:
    """Whether activations and their updates keep their size as a config's model gets wider, with a figure."""
    from etils import epath

    from lmjax import config
    from lmjax.process import start_up

    out = epath.Path(arguments.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out={out}: there is no directory {out.parent}; make it, or choose another")
    cfg = config.load(arguments.config, arguments.overrides)
    start_up.configure_jax()
    from lmjax import coordinates
    from lmjax.record.files import write_atomically
    from lmjax.run import dry_run

    cfg = dry_run.with_known_vocab(cfg)
    models = [coordinates.at_width(cfg.model, width, larger_heads=arguments.larger_heads) for width in arguments.widths]
    measured = [
        coordinates.measure(dataclasses.replace(cfg, model=model), updates=arguments.updates, seeds=arguments.seeds)
        for model in models
    ]
    print(coordinates.table(coordinates.slopes(arguments.widths, measured)))
    title = f"{cfg.model.parametrization}, {cfg.optimizer.name}"
    write_atomically(out, coordinates.figure(arguments.widths, measured, title))
    print(f"{out}: the figure")
    return 0


def convert(arguments: Arguments) -> int:
    """A foreign checkpoint or adapter into a work directory (--from-hf, --from-llama2c, --from-peft), or back."""
    from lmjax.models import decoder
    from lmjax.run import convert, merge, peft
    from lmjax.weights import count

    convert.check_flags(vars(arguments))
    if arguments.to_hf:
        files = merge.to_hf(
            arguments.workdir,
            arguments.out,
            step=arguments.step,
            layout=arguments.layout,
            dtype=arguments.dtype or "float32",
            shard_bytes=max(1, round((arguments.shard_gb or 5.0) * 1e9)),
        )
        print(f"{arguments.out}: {', '.join(files)}")
        return 0
    if arguments.to_peft:
        print(f"{arguments.out}: {', '.join(peft.to_peft(arguments.workdir, arguments.out, step=arguments.step))}")
        return 0
    if arguments.from_peft:
        adapter = peft.from_peft(arguments.from_peft, arguments.base, arguments.workdir)
        print(f"{arguments.workdir}: {adapter.name} beside {len(adapter.targets)} weights")
        return 0
    if arguments.from_llama2c:
        imported = convert.from_llama2c(
            arguments.from_llama2c, arguments.tokenizer, arguments.workdir, arguments.sha256
        )
    else:
        imported = convert.from_hf(arguments.from_hf, arguments.workdir, arguments.sha256)
    print(f"{arguments.workdir}: {count(decoder.weights(imported.model)).total:,} parameters")
    if imported.tokenizer is None:
        print("the checkpoint brings no tokenizer; put one into the work directory's tokenizer/")
    return 0


def merge(arguments: Arguments) -> int:
    """One plain model of a work directory that stands on frozen weights: adapters are added to what they are beside."""
    from lmjax.models import decoder
    from lmjax.run import merge
    from lmjax.weights import count

    merged = merge.merge(arguments.workdir, arguments.out, step=arguments.step, layout=arguments.layout)
    print(f"{arguments.out}: {count(decoder.weights(merged.model)).total:,} parameters")
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def replay(arguments: Arguments) -> int:
    """Do one step of a run again, from the checkpoint before it, and print the norms of every layer."""
    from lmjax.process import start_up
    from lmjax.run import replay

    start_up.configure_jax()
    for line in replay.described(replay.replay(arguments.workdir, arguments.step), arguments.workdir, arguments.step):
        print(line)
    return 0


def rollback(arguments: Arguments) -> int:
    """Go back to an earlier checkpoint of a run, and leave out the samples that followed it."""
    from lmjax.run.rollback import roll_back

    aside = roll_back(arguments.workdir, arguments.to, arguments.skip_samples)
    if aside:
        print(f"set aside: {', '.join(aside)}")
    print(
        f"{arguments.workdir} goes on from step {arguments.to}, and leaves out the next {arguments.skip_samples:,} "
        "samples: run the train command again"
    )
    return 0


def inspect(arguments: Arguments) -> int:
    """What a checkpoint holds."""
    from lmjax.record import inspect

    print(
        visible(inspect.format_inspection(inspect.inspect(arguments.path, step=arguments.step, hashes=arguments.hash)))
    )
    return 0


def verify(arguments: Arguments) -> int:
    """Hash every file of checkpoints, prepared data, a curation, or of what a teacher said, against its record."""
    from etils import epath

    from lmjax.data.curate import result
    from lmjax.data.store import dataset, manifest
    from lmjax.finetune import stored
    from lmjax.run import workdir

    path = epath.Path(arguments.path)
    if (path / result.FILE).exists():
        fingerprint = result.verified_curation(path).fingerprint
        print(f"{path}: every file is as it was written; fingerprint {fingerprint}")
        return 0
    if (path / manifest.FILE).exists():
        fingerprint = dataset.verify_dataset(path).manifest.fingerprint
        print(f"{path}: every file is as it was written; fingerprint {fingerprint}")
        return 0
    if (path / stored.FILE).exists():
        stored.Store(path).verify()
        print(f"{path}: every file is as it was written")
        return 0
    if problems := workdir.verify(path):
        raise CheckpointError(f"{path}: {'; '.join(problems)}")
    print(f"{path}: every checkpoint is as it was sealed")
    return 0
