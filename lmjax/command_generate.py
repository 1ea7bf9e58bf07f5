"""The command `lmjax generate`: text from a trained model, or from one with several adapters, one after another."""

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING

from lmjax.errors import ConfigError, visible
from lmjax.process import ending

if TYPE_CHECKING:
    from lmjax.generate.config import GenerateConfig
    from lmjax.run.trained import Trained


def generate(arguments: argparse.Namespace) -> int:
    """Text from a trained model."""
    from lmjax.process import start_up

    if arguments.system is not None and not arguments.chat:
        raise ConfigError("--system stands before a conversation: add --chat, or leave it out")
    if arguments.chat and not arguments.prompt:
        raise ConfigError("--chat needs something to answer: give --prompt=TEXT")
    with start_up.importing():
        from lmjax.generate.config import GenerateConfig
        from lmjax.run import adapters, trained
        from lmjax.schema import validated

        start_up.configure_jax()
    fields = {field.name for field in dataclasses.fields(GenerateConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    if arguments.temperature is None:
        given["temperature"] = 0.8 if arguments.beams == 1 else 0.0
    cfg = validated(GenerateConfig, given | {"stop_at_endoftext": not arguments.ignore_endoftext})
    with ending.within_memory("--tokens, --beams or the number of prompts"):
        if arguments.adapter:
            base = arguments.workdir if arguments.step is None else f"{arguments.workdir}@{arguments.step}"
            for adapter in adapters.load_adapters(base, arguments.adapter):
                print(f"=== {visible(adapter.name)}", flush=True)
                _answer(arguments, cfg, adapter.trained, adapter.templates)
        else:
            found = trained.load_trained(arguments.workdir, arguments.step)
            _answer(arguments, cfg, found, f"{arguments.workdir}/tokenizer")
    return 0


def _answer(
    arguments: argparse.Namespace, cfg: "GenerateConfig", trained: "Trained", templates: str | os.PathLike[str]
) -> None:
    """Print what a model makes of the prompts: of a single one as it comes."""
    from lmjax.generate import decode

    prompts = arguments.prompt or [""]
    asked = _conversations(arguments, trained, templates) if arguments.chat else prompts
    shown = [""] * len(prompts) if arguments.chat else prompts
    if len(prompts) == 1 and cfg.beams == 1:
        pieces = decode.stream(trained.model, trained.params, trained.tokenizer, asked[0], cfg)
        print(visible(shown[0]), end="", flush=True)
        for piece in pieces:
            print(visible(piece), end="", flush=True)
        print()
        return
    generations = decode.generate(trained.model, trained.params, trained.tokenizer, asked, cfg)
    for prompt, opening, generation in zip(prompts, shown, generations, strict=True):
        print(f"--- {prompt!r}\n{visible(opening + generation.text)}")


def _conversations(
    arguments: argparse.Namespace, trained: "Trained", templates: str | os.PathLike[str]
) -> list[list[int]]:
    """Each prompt as the first turn of a conversation, by the model's own template."""
    from lmjax.data.chat.rendering import Renderer
    from lmjax.data.chat.templates import load_template

    template = load_template(templates)
    turns = [[{"role": "user", "content": prompt}] for prompt in arguments.prompt]
    if arguments.system is not None:
        turns = [[{"role": "system", "content": arguments.system}, *turn] for turn in turns]
    with Renderer(template) as renderer:
        texts = [renderer.render(turn, add_generation_prompt=True).text for turn in turns]
    return [trained.tokenizer.encode_symbols(text) for text in texts]
