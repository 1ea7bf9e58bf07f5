"""Every family computes what transformers computes, both ways. Tiny random models with every feature switched on."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate_ids
from lmjax.hf.families import FAMILIES
from lmjax.hf.imported import Imported, read_checkpoint, write_checkpoint
from lmjax.models import decoder
from lmjax.weights import by_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 1e-4  # largest absolute difference of a float32 logit
V, T, WINDOW, NEW = 61, 40, 5, 64
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large enough that no part is idle
}
TOKENS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8, "rope_theta": 100.0}
# Texts are longer than the windows and than the length that scaled rotations stretch.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": V, "n_positions": 128, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40}),
    "llama": ("llama", {**SIZES, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {**SIZES, "rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**SIZES, "sliding_window": WINDOW, "rope_parameters": YARN}),
    "mistral, no window": ("mistral", {**SIZES, "sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": (
        "qwen2",
        {
            **SIZES,
            "tie_word_embeddings": True,
            "rope_parameters": YARN,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {**SIZES, "attention_bias": True, "rope_parameters": LINEAR}),
    "gemma2": (
        "gemma2",
        {
            **SIZES,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **SIZES,
            "num_hidden_layers": 7,  # one period and a layer
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "olmo2": ("olmo2", {name: size for name, size in SIZES.items() if name != "head_dim"} | {"attention_bias": True}),
    "mixtral": (
        "mixtral",
        {**SIZES, "num_local_experts": 5, "sliding_window": WINDOW, "rope_parameters": LINEAR},
    ),
    "mixtral, one expert a token": (
        "mixtral",
        {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": None},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **SIZES,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 12,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,  # a dense layer before every mixture
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    ),
    "qwen3_moe, weights as they are": (
        "qwen3_moe",
        {**SIZES, "moe_intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    ),
}


def quick(*names: str) -> list[Any]:
    """Every case, of which CI runs these; the others are slow tests."""
    return [pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in CASES]


class Case(NamedTuple):
    theirs: Any
    directory: Path
    ours: Imported
    tokens_BT: np.ndarray

    def reference(self, **inputs: Any) -> np.ndarray:
        return reference(self.theirs, **inputs)


def reference(model: Any, **inputs: Any) -> np.ndarray:
    with torch.no_grad():
        return model(**{name: torch.tensor(x) for name, x in inputs.items()}, use_cache=False).logits.numpy()


def test_every_family_has_a_case() -> None:
    assert {model_type for name, (model_type, _) in CASES.items() if "," not in name} == set(FAMILIES)


@pytest.fixture(scope="module", params=quick(*(name for name in CASES if "," not in name)))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A random model, saved by transformers and read by us."""
    model_type, settings = CASES[request.param]
    directory = tmp_path_factory.mktemp(model_type)
    model = random_model(model_type, settings)
    model.save_pretrained(directory)
    tokens_BT = np.random.default_rng(0).integers(V, size=(2, T))
    return Case(model, directory, read_checkpoint(directory), tokens_BT)


def random_model(model_type: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{"initializer_range": 0.3, **TOKENS, **settings})
    config._attn_implementation = "eager"  # the others leave softcaps out
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which start as the identity
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def check(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference."""
    assert np.abs(expected).max() > 1  # the model is alive
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    return float(np.abs(got - expected).max())


def test_logits(case: Case, record_property: Any) -> None:
    model = decoder.build(case.ours.model)
    got_BTV = np.asarray(jax.jit(model.logits)(case.ours.params, case.tokens_BT))
    expected_BTV = case.reference(input_ids=case.tokens_BT)
    record_property("largest difference", check(got_BTV, expected_BTV))


def test_logits_of_padded_and_packed_rows(case: Case, record_property: Any) -> None:
    """A row with padding on its left, and a row of three documents."""
    padding, ends = 11, [0, 7, 19, T]
    tokens_BT = case.tokens_BT
    index_T = np.arange(T)
    document_T = np.searchsorted(ends, index_T, side="right")
    segments_BT = np.stack([(index_T >= padding).astype(int), document_T])
    positions_BT = np.stack([np.maximum(index_T - padding, 0), index_T - np.array([0, *ends])[document_T]])
    model = decoder.build(case.ours.model)

    @jax.jit
    def logits(params: Any, tokens_BT: Any, positions_BT: Any, segments_BT: Any) -> jax.Array:
        return model.logits(params, tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)

    got_BTV = np.asarray(logits(case.ours.params, tokens_BT, positions_BT, segments_BT))
    padded_BTV = case.reference(input_ids=tokens_BT[:1], attention_mask=segments_BT[:1], position_ids=positions_BT[:1])
    differences = [check(got_BTV[0, padding:], padded_BTV[0, padding:])]
    for first, end in itertools.pairwise(ends):
        alone_BTV = case.reference(input_ids=tokens_BT[1:, first:end])
        differences.append(check(got_BTV[1, first:end], alone_BTV[0]))
    record_property("largest difference", max(differences))


@pytest.mark.parametrize("case", quick("gpt2", "mistral"), indirect=True)
def test_greedy_text(case: Case) -> None:
    """64 tokens after prompts of unequal length, the same as `model.generate` gives."""
    prompts = [case.tokens_BT[0, :9].tolist(), case.tokens_BT[1, :20].tolist()]
    cfg = GenerateConfig(tokens=NEW, temperature=0.0, stop_at_endoftext=False)
    got = generate_ids(decoder.build(case.ours.model), case.ours.params, prompts, cfg, endoftext=1, vocab=V)
    for prompt, ids in zip(prompts, got, strict=True):
        ids_BT = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
        expected = case.theirs.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **settings)
        assert ids == expected[0, len(prompt) :].tolist()


def test_there_and_back(case: Case, tmp_path: Path) -> None:
    """What we write, transformers reads: the same tensors bit for bit, the same logits; and so do we."""
    files = write_checkpoint(tmp_path, case.ours, shard_bytes=20_000)
    assert "model.safetensors.index.json" in files and len(files) > 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    theirs, ours = case.theirs.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        assert torch.equal(x, ours[name]), name
    check(reference(again, input_ids=case.tokens_BT), case.reference(input_ids=case.tokens_BT))
    imported = read_checkpoint(tmp_path)
    assert imported.model == case.ours.model
    params = by_path(imported.params)
    for path, x in by_path(case.ours.params).items():
        np.testing.assert_array_equal(x, params[path], err_msg=path)


@pytest.mark.parametrize("case", quick("llama"), indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(case: Case, tmp_path: Path, dtype: str) -> None:
    """Files of 16 bits hold the rounded weights, and reading them adds nothing."""
    write_checkpoint(tmp_path, case.ours, dtype=dtype)
    params = by_path(read_checkpoint(tmp_path).params)
    for path, x in by_path(case.ours.params).items():
        assert params[path].dtype == np.float32
        np.testing.assert_array_equal(params[path], np.asarray(x.astype(dtype)).astype(np.float32), err_msg=path)
