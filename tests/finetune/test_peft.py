"""PEFT's adapters are read, and ours are written for it: against numbers of PEFT's own, and PEFT itself where it is
installed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import config as configs
from lmjax.config import Config
from lmjax.data.config import DataConfig
from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.data.windows import as_batch
from lmjax.errors import CheckpointError, ConfigError
from lmjax.finetune.peft.directory import FORMATS, format_of, read_adapter, write_adapter
from lmjax.finetune.peft.format import CONFIG, WEIGHTS, Adapter
from lmjax.finetune.peft.modules import modules
from lmjax.hf.families import family_for
from lmjax.hf.imported import read_model
from lmjax.models.config import ModelConfig
from lmjax.record import checkpoint
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.run.merge import merge
from lmjax.run.peft import from_peft, to_peft
from lmjax.run.trained import load_trained
from lmjax.train.config import AdapterConfig, TuneConfig
from lmjax.weights import abstract, by_path
from tests.finetune.peft_fixtures import ADAPTERS, FIXTURES

safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each adapter as a work directory of ours. The tiny models bring no tokenizer."""
    made = {}
    for name in ADAPTERS:
        made[name] = tmp_path_factory.mktemp(name) / "run"
        from_peft(str(FIXTURES / name / "adapter"), str(FIXTURES / name / "base"), str(made[name]))
        ByteTokenizer().save(made[name] / "tokenizer")
    return made


def golden(name: str) -> dict[str, np.ndarray]:
    loaded: dict[str, np.ndarray] = safetensors.load_file(FIXTURES / name / "golden.safetensors")
    return loaded


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_gives_the_logits_that_it_gives_there(name: str, workdirs: dict[str, Path]) -> None:
    wanted, trained = golden(name), load_trained(workdirs[name])
    logits_BTV = trained.scorer.logits(trained.params, jnp.asarray(wanted["tokens"], jnp.int32))
    np.testing.assert_allclose(logits_BTV, wanted["logits"], atol=1e-5)
    merged = workdirs[name].parent / "merged"
    merge(str(workdirs[name]), str(merged))
    plain = load_trained(merged)
    assert all(isinstance(w, jax.Array) for w in by_path(plain.params).values())
    again_BTV = plain.scorer.logits(plain.params, jnp.asarray(wanted["tokens"], jnp.int32))
    np.testing.assert_allclose(again_BTV, logits_BTV, atol=1e-5)


def gradient(name: str, workdir: Path) -> tuple[configs.Config, Any]:
    """Of the mean next-token loss by the adapter."""
    wanted, task = golden(name), without_data(configs.from_json(workdir / "config.json"))
    experiment = assemble.assemble(task)
    frozen, params = assemble.frozen_params(experiment), restored(task, workdir)
    tokens_BU = wanted["tokens"].astype(np.int32)
    batch = as_batch(tokens_BU, tokens_BU, np.arange(2), task.cfg.data.documents)

    def loss(params: Any) -> jax.Array:
        return task.objective.loss(params, frozen, batch, None, task.objective.scalars)[0] / 16

    return task.cfg, jax.jit(jax.grad(loss))(params)["adapter"]


@pytest.mark.parametrize("name", ["llama", "llama_dora", "llama_ia3"])
def test_the_gradient_is_that_of_torch(name: str, workdirs: dict[str, Path]) -> None:
    """By each tensor there: with one module for each of our weights the gradient is written as an adapter is."""
    cfg, found = gradient(name, workdirs[name])
    assert cfg.tune.adapter is not None
    of_kind = FORMATS[str(format_of(cfg.tune.adapter.name))]
    written = of_kind.write(Adapter(cfg.tune.adapter, found), modules(cfg.model, family_for(cfg.model)), cfg.model)
    wanted = {key.removesuffix("vector.weight"): x for key, x in golden(name).items() if key.startswith("gradient ")}
    assert {f"gradient {key.removesuffix('vector')}" for key in written.tensors} == {*wanted}
    for key, x in written.tensors.items():
        np.testing.assert_allclose(x, wanted[f"gradient {key.removesuffix('vector')}"], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt2_dora"])
def test_where_three_weights_share_a_module_the_gradient_is_that_of_torch(name: str, workdirs: dict[str, Path]) -> None:
    """By B, by magnitudes, and by the A that the three have there together: the sum of ours."""
    wanted, (_, found) = golden(name), gradient(name, workdirs[name])
    leaves, paths = by_path(found), [f"segments/0/0/attention/{part}" for part in ("query", "key", "value")]
    for layer in range(2):
        key = f"gradient base_model.model.transformer.h.{layer}.attn.c_attn.lora_"
        downs = [leaves[f"{path}/down"][layer] for path in paths]
        ups = [leaves[f"{path}/up"][layer] for path in paths]
        np.testing.assert_allclose(sum(downs).T, wanted[f"{key}A.weight"], atol=1e-5)
        out = np.concatenate([np.asarray(up).reshape(len(up), -1) for up in ups], axis=1).T
        np.testing.assert_allclose(out, wanted[f"{key}B.weight"], atol=1e-5)
        if name == "gpt2_dora":
            magnitudes = [np.ravel(leaves[f"{path}/magnitude"][layer]) for path in paths]
            np.testing.assert_allclose(np.concatenate(magnitudes), wanted[f"{key}magnitude_vector.weight"], atol=1e-5)


def restored(task: Any, workdir: Path) -> Any:
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), abstract(task.spec))
    return checkpoint.restore_weights(workdir, shapes)[0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_written_for_peft_is_read_as_the_same_function(
    name: str, workdirs: dict[str, Path], tmp_path: Path
) -> None:
    """With one module for each of our weights the factors are the same, too, to the bit."""
    assert to_peft(str(workdirs[name]), str(tmp_path / "out")) == [WEIGHTS, CONFIG]
    from_peft(str(tmp_path / "out"), str(FIXTURES / name / "base"), str(tmp_path / "again"))
    ByteTokenizer().save(tmp_path / "again" / "tokenizer")
    tokens_BT = jnp.asarray(golden(name)["tokens"], jnp.int32)
    both = [load_trained(workdir) for workdir in (workdirs[name], tmp_path / "again")]
    logits = [one.scorer.logits(one.params, tokens_BT) for one in both]
    np.testing.assert_allclose(*logits, atol=1e-5)
    if name in ("llama", "llama_dora", "llama_tied", "llama_ia3"):
        theirs = safetensors.load_file(FIXTURES / name / "adapter" / WEIGHTS)
        ours = safetensors.load_file(tmp_path / "out" / WEIGHTS)
        assert {*ours} == {key for key in theirs if "base_layer" not in key}
        for key, x in ours.items():
            np.testing.assert_array_equal(x, theirs[key])


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_reads_what_is_written(name: str, workdirs: dict[str, Path], tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    to_peft(str(workdirs[name]), str(tmp_path / "out"))
    base = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / name / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        logits_BTV = model(input_ids=torch.tensor(golden(name)["tokens"])).logits
    np.testing.assert_allclose(logits_BTV.float().numpy(), golden(name)["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"use_dora": True}, CheckpointError, r"lora_magnitude_vector is None, for this model it must be \(8,\)"),
        ({"peft_type": "OFT"}, ConfigError, 'peft_type="OFT" is not supported; there is LORA, IA3'),
        ({"peft_type": "IA3"}, ConfigError, 'bias="none" is not supported'),
        ({"init_lora_weights": "pissa"}, ConfigError, 'init_lora_weights="pissa"'),
        ({"modules_to_save": ["lm_head"]}, ConfigError, "modules_to_save"),
        ({"something_new": {"x": 1}}, ConfigError, "something_new"),
        ({"lora_alpha": "many"}, ConfigError, "alpha"),
        ({"alpha_pattern": {"(.*)": 3}}, ConfigError, "only names of modules"),
        ({}, CheckpointError, "for this model it must be"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    shutil.copytree(FIXTURES / "llama" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "llama" / "base", base)
    if not change:
        (base / "config.json").write_text((base / "config.json").read_text().replace(": 12", ": 13"))
    with pytest.raises(error, match=message) as caught:
        from_peft(str(tmp_path / "adapter"), str(base), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "without", "error", "message"),
    [
        ("llama_tied", "lm_head", ConfigError, "this adapter acts on the one otherwise than on the other"),
        ("llama_dora", ".layers.1.mlp", ConfigError, "some layers have none at segments/0/0/mlp/down"),
        ("llama", "q_proj.lora_B", CheckpointError, "q_proj.lora_B.weight, but has its other factor"),
    ],
)
def test_half_an_adapter_is_refused(
    name: str, without: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    shutil.copytree(FIXTURES / name / "adapter", tmp_path / "adapter")
    tensors = safetensors.load_file(tmp_path / "adapter" / WEIGHTS)
    left = {key: x for key, x in tensors.items() if without not in key or "base_layer" in key}
    safetensors.save_file(left, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(error, match=re.escape(message)) as caught:
        read_adapter(tmp_path / "adapter", read_model(FIXTURES / name / "base")[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "adapter", "message"),
    [
        ("mixtral", {"targets": ("experts/up",)}, "gate and up of experts in one; target both or neither"),
        ("mixtral", {"targets": ("moe/router",)}, "PEFT has no place for adapters beside segments/0/0/moe/router"),
        (
            "gpt2",
            {"name": "dora", "targets": ("attention/query",)},
            "has magnitudes for segments/0/0/attention/key, too",
        ),
        ("gpt2", {"name": "ia3", "targets": ("mlp/up",)}, "rescales the bias of transformer.h.0.mlp.c_fc in PEFT"),
    ],
)
def test_what_peft_has_no_place_for_is_refused(name: str, adapter: Any, message: str, tmp_path: Path) -> None:
    """And nothing is written."""
    model, cfg = read_model(FIXTURES / name / "base")[0], AdapterConfig(**adapter)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        write_adapter(tmp_path / "out", zeros(model, cfg), model, "")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def zeros(model: ModelConfig, cfg: AdapterConfig) -> Adapter:
    task = without_data(Config(model=model, data=DataConfig(seq_len=8), tune=TuneConfig(adapter=cfg)))
    return Adapter(cfg, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(task.spec))["adapter"])


def test_experts_count_as_much_where_peft_fuses_them(tmp_path: Path) -> None:
    """It doubles rank and alpha of gate and up, by which alpha over the root of the rank would grow."""
    model = read_model(FIXTURES / "mixtral" / "base")[0]
    cfg = AdapterConfig(targets=("experts/*",), rank=2, alpha=6.0, rank_stabilized=True)
    write_adapter(tmp_path / "out", zeros(model, cfg), model, "")
    values = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert not values["use_rslora"] and values["lora_alpha"] / values["r"] == pytest.approx(6 / 2**0.5)


def test_dropout_is_left_out_where_none_acts(caplog: pytest.LogCaptureFixture) -> None:
    """Aloud, and the adapter is read."""
    model = read_model(FIXTURES / "llama_tied" / "base")[0]
    assert read_adapter(FIXTURES / "llama_tied" / "adapter", model).cfg.dropout == 0
    assert "lora_dropout is left out, since none acts on 'embed' here" in caplog.text
