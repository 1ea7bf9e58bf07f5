"""Directories as they lie about: what publishers and older programs wrote, beside what transformers writes today."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.errors import CheckpointError, ConfigError
from lmjax.hf.config_json import differences, read_config
from lmjax.hf.families import FAMILIES
from lmjax.hf.imported import CONFIG, Imported, read_checkpoint, write_checkpoint
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.weights import Params, by_path, initialize

safetensors = pytest.importorskip("safetensors.numpy")

LLAMA = ModelConfig(
    vocab=61, context=64, layers=2, embed=16, heads=4, kv_heads=2, mlp=24, activation="silu", gated=True, tied=True
)
GPT2 = ModelConfig(
    vocab=61, context=32, layers=2, embed=16, heads=4, mlp=24, norm="layer", norm_epsilon=1e-5, bias=True,
    position="learned",
)  # fmt: skip


def written(directory: Path, cfg: ModelConfig) -> Params:
    """A checkpoint of random weights as we write it; its params."""
    params = initialize(decoder.weights(cfg), jax.random.key(0))
    write_checkpoint(directory, Imported(cfg, params, None, {}))
    return params


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return safetensors.load_file(directory / "model.safetensors")


def replace(directory: Path, content: Mapping[str, np.ndarray], **fields: Any) -> None:
    """Other tensors, other fields in config.json."""
    safetensors.save_file(dict(content), directory / "model.safetensors")
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(values | fields))


def same(found: Params, expected: Params) -> None:
    paths = by_path(expected)
    assert by_path(found).keys() == paths.keys()
    for path, x in by_path(found).items():
        np.testing.assert_array_equal(x, paths[path], err_msg=path)


def test_gpt2_as_first_published(tmp_path: Path) -> None:
    """Names without a prefix, the causal mask in every layer, half the fields missing, some that nobody reads."""
    params = written(tmp_path, GPT2)
    bare = {name.removeprefix("transformer."): x for name, x in tensors(tmp_path).items()}
    for layer in range(2):
        bare[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.float32))
        bare[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    replace(tmp_path, bare)
    small = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_head": 4, "n_layer": 2}
    extra = {"n_ctx": 32, "_num_labels": 1, "eos_token_id": 50256, "label2id": {"LABEL_0": 0}, "n_inner": 24}
    (tmp_path / CONFIG).write_text(json.dumps(small | extra | {"vocab_size": 61, "n_positions": 32}))
    read = read_checkpoint(tmp_path)
    assert not differences(read.model, GPT2)
    same(read.params, params)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaModel", None])
def test_a_model_without_its_prefix(tmp_path: Path, architecture: str | None) -> None:
    params = written(tmp_path, LLAMA)
    bare = {name.removeprefix("model."): x for name, x in tensors(tmp_path).items()}
    replace(tmp_path, bare, architectures=None if architecture is None else [architecture])
    same(read_checkpoint(tmp_path).params, params)


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    written(tmp_path, LLAMA)
    replace(tmp_path, tensors(tmp_path), architectures=["LlamaModel"], tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        read_checkpoint(tmp_path)


def test_rotary_frequencies_are_no_weights(tmp_path: Path) -> None:
    params = written(tmp_path, LLAMA)
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for layer in range(2)}
    replace(tmp_path, tensors(tmp_path) | old)
    same(read_checkpoint(tmp_path).params, params)


def test_a_head_of_a_tied_model_beside_bare_names(tmp_path: Path) -> None:
    params = written(tmp_path, GPT2)
    bare = {name.removeprefix("transformer."): x for name, x in tensors(tmp_path).items()}
    replace(tmp_path, bare | {"lm_head.weight": bare["wte.weight"]})
    same(read_checkpoint(tmp_path).params, params)


def test_fields_that_the_family_does_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said aloud, once; what belongs to training or to other programs needs no word."""
    params = written(tmp_path, LLAMA)
    known = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    replace(tmp_path, tensors(tmp_path), **known)
    same(read_checkpoint(tmp_path).params, params)
    assert not caplog.records
    replace(tmp_path, tensors(tmp_path), my_notes="a small one", loss=1.5)
    same(read_checkpoint(tmp_path).params, params)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert 'models of type llama do not read: loss=1.5, my_notes="a small one"' in record.getMessage()


# What transformers means by a field that is missing -----------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_fields_mean_what_transformers_takes_them_for(
    model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The fewest fields that we accept and all those of the family's class describe the same model."""
    transformers = pytest.importorskip("transformers")
    every = json.loads(transformers.AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    every.pop("architectures")
    fewest = {"model_type": model_type}
    while True:
        try:
            cfg = read_config(fewest, FAMILIES[model_type], "config.json")
            break
        except ConfigError as error:
            name = str(error).split("has no '")[1].split("'")[0]
            fewest[name] = every[name]
    assert len(fewest) < 8
    assert not differences(cfg, read_config(every, FAMILIES[model_type], "config.json"))
    assert not caplog.records  # every field of the class is accounted for
