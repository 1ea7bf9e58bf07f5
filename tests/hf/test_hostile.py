"""Checkpoints that are damaged, wrong or hostile: one line that says what and where, and no code runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.errors import CheckpointError, ConfigError, DataError, LmjaxError
from lmjax.hf.config_json import REQUIRED, Family, read_config
from lmjax.hf.families import FAMILIES, family_for
from lmjax.hf.imported import Imported, read_checkpoint, write_checkpoint
from lmjax.models import decoder
from lmjax.models.config import ModelConfig
from lmjax.weights import by_path, initialize

pytest.importorskip("safetensors")

CFG = ModelConfig(
    vocab=61, context=64, layers=2, embed=16, heads=4, kv_heads=2, mlp=24, activation="silu", gated=True, tied=False
)
TIED = ModelConfig(vocab=61, context=64, layers=1, embed=16, heads=4, mlp=24, activation="silu", gated=True)
Header = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint in several shards."""
    directory = tmp_path_factory.mktemp("good")
    params = initialize(decoder.weights(CFG), jax.random.key(0))
    write_checkpoint(directory, Imported(CFG, params, None, {}), shard_bytes=4000)
    return directory


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_header(path: Path, change: Callable[[Header], Any]) -> None:
    """Change what a safetensors file says of itself, not its content."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def refused(directory: Path, kind: type[LmjaxError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_checkpoint(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value) or "config.json" in str(caught.value)


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[0]


def test_the_sound_one_is_read(good: Path) -> None:
    imported = read_checkpoint(good)
    expected = by_path(initialize(decoder.weights(CFG), jax.random.key(0)))
    for path, x in by_path(imported.params).items():
        np.testing.assert_array_equal(x, expected[path])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map.* names code to run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.* quantized"),
        ({"model_type": "mamba"}, "model_type='mamba' is not supported; there is gpt2"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures.* LlamaForCausalLM"),
        ({"hidden_act": "evil"}, 'hidden_act="evil" is no activation'),
        ({"hidden_size": 10**12}, "embed=1000000000000"),
        ({"hidden_size": "wide"}, "hidden_size|embed"),
        ({"hidden_size": -4}, "hidden_size|embed"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers are not a number up to 10000"),
        ({"num_hidden_layers": 9999}, "cannot be 9999 layers"),
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"has model\.layers\.1\."),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has no factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "odd": 1}}, "rope_scaling.odd is not supported"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type=.* is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling.* not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; it must be 1"),
        ({"mlp_bias": True}, "mlp_bias=true without attention_bias"),
        ({"architectures": "LlamaForCausalLM"}, "architectures.* LlamaForCausalLM"),
        ({"architectures": [{}]}, "architectures.* LlamaForCausalLM"),
        ({"rms_norm_eps": "nan"}, "norm_epsilon"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight"),
    ],
)
def test_fields_of_config_json(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(copy / "config.json", lambda values: values.update(changes))
    refused(copy, LmjaxError, message)  # type: ignore[type-abstract]


_SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
}
_GPT2 = {"vocab_size": 61, "n_positions": 128, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40}
WRONG = ("4", [], {}, True, -1)
STRANGE = (None, 0, 2**70, 10**400, 1e308)
EMPTY = ({"rope_scaling": {}}, {"rope_parameters": {}}, {"mlp_only_layers": []}, {"architectures": []},
         {"pruned_heads": {}})  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_field_of_a_wrong_type(family: Family) -> None:
    """A text, a list, an object, a switch or a negative number in place of a number, and so on, is refused in one line;
    nothing, no field at all, and numbers beyond any bound are refused or read."""
    sizes = _GPT2 if family.model_type == "gpt2" else _SMALL
    read = {**family.defaults, **dict.fromkeys([*REQUIRED, *family.required, "architectures"])}
    sound = {name: size for name, size in sizes.items() if name in {**family.fields, **family.defaults}}
    read_config(sound, family, "config.json")
    for name in {**sound, **read}.keys() - family.irrelevant:
        accepted = (*REQUIRED.get(name, ()), *family.required.get(name, ()))
        same = type(sound.get(name, family.defaults.get(name)))
        for value in WRONG:
            if is_read(sound | {name: value}, family):
                right = value != -1 and type(value) is same
                assert value in accepted or right or {name: value} in EMPTY, f"{name}={value!r} was read"
        for value in STRANGE:
            is_read(sound | {name: value}, family)
        is_read({key: value for key, value in sound.items() if key != name}, family)


@pytest.mark.parametrize("key", ["factor", "rope_theta", "attention_factor", "beta_fast", "partial_rotary_factor"])
def test_every_number_of_a_rotation_of_a_wrong_type(key: str) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0}
    for name in ("rope_scaling", "rope_parameters"):
        assert is_read(_SMALL | {name: rope}, FAMILIES["llama"])
        for value in WRONG:
            assert not is_read(_SMALL | {name: rope | {key: value}}, FAMILIES["llama"]), f"{name}.{key}={value!r}"
        for value in STRANGE:
            is_read(_SMALL | {name: rope | {key: value}}, FAMILIES["llama"])


def is_read(values: dict[str, Any], family: Family) -> bool:
    """Whether the config.json is read; otherwise it is refused as a user's mistake is."""
    try:
        read_config(values, family, "config.json")
    except ConfigError as error:
        assert str(error).startswith("config.json") and "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\x00\x01"])
def test_config_json_that_is_none(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    refused(copy, ConfigError, "config.json (is not JSON|holds no JSON object)")


def test_a_field_that_is_needed(copy: Path) -> None:
    edit_json(copy / "config.json", lambda values: values.pop("hidden_size"))
    refused(copy, ConfigError, "has no 'hidden_size'")


def test_a_missing_shard(copy: Path) -> None:
    first_shard(copy).unlink()
    refused(copy, CheckpointError, "is missing, which model.safetensors.index.json lists")


@pytest.mark.parametrize("file", ["../good/x.safetensors", "/etc/passwd", "/tmp/x.safetensors", "..\\x.safetensors"])
def test_an_index_that_points_elsewhere(copy: Path, file: str) -> None:
    edit_json(copy / "model.safetensors.index.json", lambda index: index["weight_map"].update({"lm_head.weight": file}))
    refused(copy, CheckpointError, "which is no .safetensors file of its directory")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"x": 3}])
def test_an_index_without_a_map(copy: Path, weight_map: Any) -> None:
    edit_json(copy / "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map))
    refused(copy, CheckpointError, "has no weight_map")


def test_an_index_that_says_other_than_the_shards(copy: Path) -> None:
    def move(index: dict[str, Any]) -> None:
        index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.norm.weight"]

    edit_json(copy / "model.safetensors.index.json", move)
    refused(copy, CheckpointError, r"do not hold 'lm_head\.weight' as")


def test_only_pickles(copy: Path) -> None:
    for path in copy.glob("model*"):
        path.unlink()
    refused(copy, CheckpointError, "holds no model.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    refused(copy, CheckpointError, "is a pickle, which can run code and is never read")


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_truncated_file(copy: Path, cut: int) -> None:
    shard = first_shard(copy)
    shard.write_bytes(shard.read_bytes()[:cut])
    refused(copy, CheckpointError, f"{shard.name} is damaged")


def test_absurd_headers(copy: Path) -> None:
    shard = first_shard(copy)
    content = shard.read_bytes()
    for start in (2**63, 2**40, 10**8):
        shard.write_bytes(start.to_bytes(8, "little") + content[8:])
        refused(copy, CheckpointError, f"{shard.name} is damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.update(data_offsets=[0, 4]),
        lambda one: one.update(data_offsets=[8, one["data_offsets"][1]]),
        lambda one: one.update(data_offsets=[-8, one["data_offsets"][1]]),
        lambda one: one.update(shape=[2**40, 2**40]),
        lambda one: one.update(shape=[-1]),
        lambda one: one.update(dtype="PY"),
    ],
)
def test_headers_that_lie(copy: Path, change: Callable[[Header], Any]) -> None:
    shard = first_shard(copy)
    edit_header(shard, lambda header: change(next(one for name, one in header.items() if name != "__metadata__")))
    refused(copy, CheckpointError, f"{shard.name} is damaged")


def test_overlapping_tensors(copy: Path) -> None:
    def overlap(header: Header) -> None:
        first, second = [one for name, one in header.items() if name != "__metadata__"][:2]
        second["data_offsets"] = first["data_offsets"]

    shard = next(path for path in sorted(copy.glob("model-*")) if path.read_bytes()[:400].count(b"data_offsets") > 1)
    edit_header(shard, overlap)
    refused(copy, CheckpointError, f"{shard.name} is damaged")


def single_file(directory: Path, cfg: ModelConfig = CFG) -> Path:
    params = initialize(decoder.weights(cfg), jax.random.key(0))
    write_checkpoint(directory, Imported(cfg, params, None, {}))
    return directory / "model.safetensors"


def rename(old: str, new: str) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[new] = header.pop(old)

    return change


def test_names_shapes_and_types(tmp_path: Path) -> None:
    path, norm = single_file(tmp_path), "model.layers.1.input_layernorm.weight"
    sound = path.read_bytes()
    cases: list[tuple[Callable[[Header], Any], str]] = [
        (rename(norm, "model.layers.1.ln.weight"), f"lacks {norm} .it has model.layers.1.ln.weight"),
        (rename(norm, "__class__"), f"lacks {norm}"),
        (lambda header: header[norm].update(shape=[4, 4]), f"{norm} is .4, 4., by config.json it must be .16,."),
        (lambda header: header[norm].update(dtype="I32"), f"{norm} is I32; only F32, F16, BF16 are read"),
        (lambda header: header[norm].update(dtype="F8_E4M3", shape=[64]), f"{norm} is .64,., by config.json"),
    ]
    for change, message in cases:
        path.write_bytes(sound)
        edit_header(path, change)
        refused(tmp_path, CheckpointError, message)


def test_an_unknown_tensor(tmp_path: Path) -> None:
    path = single_file(tmp_path)
    edit_json(tmp_path / "config.json", lambda values: values.update(attention_bias=False))
    content = path.read_bytes()
    edit_header(
        path,
        lambda header: header.update(
            extra={"dtype": "F32", "shape": [1], "data_offsets": [end(header), end(header) + 4]}
        ),
    )
    path.write_bytes(path.read_bytes() + b"\0" * 4)
    assert len(path.read_bytes()) > len(content)
    refused(tmp_path, CheckpointError, "has extra, which a llama of its config.json has not")


def end(header: Header) -> int:
    return max(one["data_offsets"][1] for name, one in header.items() if name != "__metadata__")


def test_a_head_that_repeats_the_embedding(tmp_path: Path) -> None:
    """Many tied checkpoints hold it twice: equal, it is read; different, refused."""
    untied = ModelConfig(**{**vars(TIED), "tied": False})
    for same in (True, False):
        directory = tmp_path / str(same)
        params = initialize(decoder.weights(untied), jax.random.key(0))
        if same:
            params["unembed"] = params["embed"].T
        write_checkpoint(directory, Imported(untied, params, None, {}))
        edit_json(directory / "config.json", lambda values: values.update(tie_word_embeddings=True))
        if same:
            np.testing.assert_array_equal(read_checkpoint(directory).params["embed"], params["embed"])
        else:
            refused(directory, CheckpointError, "lm_head.weight is not model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{", "is not a Hugging Face tokenizer"),
        ("tokenizer.json", b"\x80\x04\x95", "is not a Hugging Face tokenizer"),
        ("tokenizer.model", b"\x80\x04\x95", "tokenizer.model"),
        ("tokenizer_config.json", b"[]", "holds no JSON object"),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}', "auto_map names code to run"),
        ("chat_template.jinja", b"x" * (17 << 20), "which no file of this name has"),
    ],
)
def test_tokenizers(copy: Path, file: str, content: bytes, message: str) -> None:
    (copy / file).write_bytes(content)
    refused(copy, DataError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "alibi"}, "model.position='alibi'"),
        ({"qk_norm": True, "norm": "layer"}, "model"),
        ({"embed_norm": True}, "model.embed_norm=True"),
        ({"activation": "silu", "gated": False}, "model.gated=False"),
        ({"gated": False, "logit_scale": 8.0, "attention_scale": 0.4}, "models of .* have no model.gated=False, "),
    ],
)
def test_a_model_that_no_family_computes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    cfg = ModelConfig(**{**vars(CFG), **changes})
    with pytest.raises(ConfigError, match=f"no Hugging Face family computes what this model does.*{message}"):
        family_for(cfg)


def test_nothing_is_written_over(good: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        write_checkpoint(good, read_checkpoint(good))


def test_a_number_that_the_type_cannot_hold(tmp_path: Path) -> None:
    params = initialize(decoder.weights(TIED), jax.random.key(0))
    params["embed"] = params["embed"].at[0, 0].set(1e6)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has values that float16 cannot hold"):
        write_checkpoint(tmp_path, Imported(TIED, params, None, {}), dtype="float16")
