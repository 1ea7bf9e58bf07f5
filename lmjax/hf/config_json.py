"""config.json <-> ModelConfig, by a family's table.

Reading accounts for every field: it is mapped, it must have the one value that we compute, or it is declared
irrelevant; a field of no meaning to the family is left out, aloud. Writing is checked by reading back what was written:
a model that its family cannot express is refused by the name of the setting that got lost.
"""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.errors import ConfigError
from lmjax.hf.tensors import Tensor
from lmjax.models.config import ModelConfig, MoeConfig, RopeConfig
from lmjax.schema import validated

logger = logging.getLogger(__name__)

Json = dict[str, Any]


class Fields:
    """The fields of a config.json; what is never taken is known at the end."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.where = where
        self._values = values
        self._defaults = defaults
        self._left = set(values)

    def take(self, name: str) -> Any:
        """A field's value, or what its family means by leaving it out. Raises ConfigError if that is undefined."""
        self._left.discard(name)
        if name not in self._values and name not in self._defaults:
            raise ConfigError(f"{self.where} has no '{name}'; a model of this kind needs it")
        return self._values[name] if name in self._values else self._defaults[name]

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def refuse(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name}={json.dumps(self._values.get(name))[:80]} {why}")

    def left(self) -> set[str]:
        return self._left


class Rule(NamedTuple):
    """Fields that are more than a renaming: a function for each direction."""

    read: Callable[[Fields], dict[str, Any]]
    """-> fields of ModelConfig. Raises ConfigError for a value that the decoder cannot compute."""
    write: Callable[[ModelConfig], Json]


@dataclasses.dataclass(frozen=True)
class Family:
    """All that is particular to one kind of checkpoint."""

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    """config.json's name -> ModelConfig's, where the value is the same."""
    defaults: Mapping[str, Any]
    """What it means that a field is missing in config.json."""
    fixed: Mapping[str, Any]
    """Settings that every model of the family has."""
    rules: tuple[Rule, ...]
    tensors: tuple[Tensor, ...]
    required: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Fields for which only these values are computed here."""
    irrelevant: frozenset[str] = frozenset()
    """Fields without effect on what the trained model computes, beside the `IRRELEVANT` ones."""
    prefix: str = "model."
    """Checkpoints of the model without its head leave it out in front of every name."""


# Training, generation, other heads, provenance.
IRRELEVANT = frozenset(
    """
    _name_or_path _num_labels architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range is_llama_config label2id
    length_penalty max_length max_sequence_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    rope_interleaved sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed use_bfloat16 use_cache
    """.split()
)
REQUIRED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "use_bidirectional_attention": (False, None),
}
MOST_LAYERS = 10_000
REFUSED = {
    "auto_map": "names code to run, and none is ever run; convert a checkpoint of a known model_type",
    "quantization_config": "means quantized weights, which are not read; convert an unquantized checkpoint",
}


def read_json(path: Path) -> Json:
    """The object in a JSON file. Raises ConfigError when there is none."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the directory of a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({str(error)[:100]}); restore the file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object; restore the file")
    return values


def read_config(values: Json, family: Family, where: str) -> ModelConfig:
    """The decoder that a config.json describes. Raises ConfigError for a field with a value that it cannot compute.

    A field that transformers' model of this type does not read is left out with a warning.
    """
    fields = Fields(values, family.defaults, where)
    for name, why in REFUSED.items():
        if fields.has(name):
            raise fields.refuse(name, why)
    architectures = values.get("architectures")
    if architectures is None or architectures == []:
        architectures = [family.architecture]
    without_head = re.sub("(ForCausalLM|LMHeadModel)$", "Model", family.architecture)
    if not isinstance(architectures, list) or not any(
        one in architectures for one in (family.architecture, without_head)
    ):
        raise fields.refuse("architectures", f"is not a {family.architecture}; only language models are read")
    settings = dict(family.fixed)
    settings |= {ours: fields.take(theirs) for theirs, ours in family.fields.items()}
    if not isinstance(settings["layers"], int) or settings["layers"] > MOST_LAYERS:
        raise ConfigError(f"{where}: {settings['layers']!r} layers are not a number up to {MOST_LAYERS}")
    for rule in family.rules:
        settings |= rule.read(fields)
    left = fields.left() - IRRELEVANT - family.irrelevant
    required = {**REQUIRED, **family.required}
    for name in left & set(required):
        if values[name] not in required[name]:
            raise fields.refuse(name, f"is not supported; it must be {json.dumps(required[name][0])}")
    if unknown := sorted(left - set(required)):
        names = ", ".join(f"{name}={json.dumps(values[name])[:40]}" for name in unknown)
        logger.warning("%s: left out, since models of type %s do not read: %s", where, family.model_type, names)
    try:
        return validated(ModelConfig, settings, strict=True)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def write_config(cfg: ModelConfig, family: Family, dtype: str) -> Json:
    """The config.json of a model. Raises ConfigError naming the settings that this family has no field for."""
    values = _written(cfg, family)
    if lost := differences(cfg, read_config(values, family, "config.json")):
        names = ", ".join(f"model.{name}={ours!r}" for name, (ours, _) in lost.items())
        raise ConfigError(f"models of type {family.model_type} have no {names}")
    return values | {"torch_dtype": dtype, "use_cache": True}


def n_lost(cfg: ModelConfig, family: Family) -> float:
    """How many settings of a model this family has no field for; infinite where it is of another kind altogether."""
    try:
        return len(differences(cfg, read_config(_written(cfg, family), family, "config.json")))
    except ConfigError:  # it needs what the model has not, such as experts
        return math.inf


def _written(cfg: ModelConfig, family: Family) -> Json:
    values: Json = {"architectures": [family.architecture], "model_type": family.model_type}
    values |= {theirs: getattr(cfg, ours) for theirs, ours in family.fields.items()}
    for rule in family.rules:
        values |= rule.write(cfg)
    return values


_TRAINING = ("dropout", "attention_dropout", "embed_dropout", "init_std", "embed_init_std", "residual_init_scale")
_MACHINE = ("attention", "dtype", "remat", "unroll")


def differences(one: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that make the two compute different functions."""
    first, second = (dataclasses.asdict(canonical(cfg)) for cfg in (one, other))
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


def canonical(cfg: ModelConfig) -> ModelConfig:
    """The same function of the same weights, with what is implied written out and what has no effect at its default."""
    dims, standard = cfg.dims, ModelConfig()
    return dataclasses.replace(
        cfg,
        kv_heads=dims["kv_heads"],
        head_dim=dims["head_dim"],
        attention_bias=cfg.attention_bias and not cfg.bias,
        qkv_bias=cfg.qkv_bias and not (cfg.bias or cfg.attention_bias),
        qk_norm_heads=cfg.qk_norm_heads if cfg.qk_norm else "each",
        attention_scale=cfg.attention_scale or dims["head_dim"] ** -0.5,
        pattern=shortest_period(tuple(kind.mixer for kind in cfg.kinds)),
        moe=_canonical_moe(cfg),
        rope=_canonical_rope(cfg),
        **{name: getattr(standard, name) for name in _TRAINING + _MACHINE},
    )


def _canonical_rope(cfg: ModelConfig) -> RopeConfig:
    if cfg.position != "rope":
        return RopeConfig()
    read = {"linear": ("factor",), "llama3": ("factor", "low_frequency_factor", "high_frequency_factor")}
    read |= {"yarn": ("factor", "beta_fast", "beta_slow", "attention_factor")}
    names = read.get(cfg.rope.scaling, ()) + (("original_context",) if cfg.rope.scaling in ("llama3", "yarn") else ())
    return RopeConfig(
        theta=cfg.rope.theta,
        local_theta=cfg.rope.local_theta if "local" in cfg.pattern else None,
        scaling=cfg.rope.scaling,
        **{name: getattr(cfg.rope, name) for name in names},
    )


def _canonical_moe(cfg: ModelConfig) -> MoeConfig:
    if cfg.moe.experts is None:
        return MoeConfig()
    standard = MoeConfig()
    training = ("dispatch", "capacity_factor", "balance_weight", "router_z_weight")
    return dataclasses.replace(
        cfg.moe,
        mlp=cfg.moe.mlp or cfg.mlp,
        pattern=shortest_period(tuple(kind.mlp for kind in cfg.kinds)),
        dense_first=0,
        **{name: getattr(standard, name) for name in training},
    )


def shortest_period(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shortest pattern that, repeated and cut, gives the layers."""
    periods = (kinds[:length] for length in range(1, len(kinds) + 1))
    return next(period for period in periods if all(kind == period[i % len(period)] for i, kind in enumerate(kinds)))
