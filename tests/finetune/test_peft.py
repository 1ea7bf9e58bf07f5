"""PEFT's adapters are read, and ours are written for it: against numbers of PEFT's own, and PEFT itself where it is
installed."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import config as configs
from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.data.windows import as_batch
from lmjax.errors import CheckpointError, ConfigError
from lmjax.finetune.peft import CONFIG, WEIGHTS
from lmjax.record import checkpoint
from lmjax.registry import without_data
from lmjax.run import assemble
from lmjax.run.convert import merge
from lmjax.run.peft import from_peft, to_peft
from lmjax.run.trained import load_trained
from lmjax.weights import abstract, by_path
from tests.finetune.peft_fixtures import FAMILIES, FIXTURES

safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each adapter as a work directory of ours. The tiny models bring no tokenizer."""
    made = {}
    for name in FAMILIES:
        made[name] = tmp_path_factory.mktemp(name) / "run"
        from_peft(str(FIXTURES / name / "adapter"), str(FIXTURES / name / "base"), str(made[name]))
        ByteTokenizer().save(made[name] / "tokenizer")
    return made


def golden(name: str) -> dict[str, np.ndarray]:
    loaded: dict[str, np.ndarray] = safetensors.load_file(FIXTURES / name / "golden.safetensors")
    return loaded


@pytest.mark.parametrize("name", FAMILIES)
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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_gradient_is_that_of_torch(name: str, workdirs: dict[str, Path]) -> None:
    """Of the mean next-token loss, by each factor; where three of our weights share a module, A's is their sum."""
    wanted, task = golden(name), without_data(configs.from_json(workdirs[name] / "config.json"))
    experiment = assemble.assemble(task)
    frozen, params = assemble.frozen_params(experiment), restored(task, workdirs[name])
    tokens_BU = wanted["tokens"].astype(np.int32)
    batch = as_batch(tokens_BU, tokens_BU, np.arange(2), task.cfg.data.documents)

    def loss(params: Any) -> jax.Array:
        return task.objective.loss(params, frozen, batch, None, task.objective.scalars)[0] / 16

    leaves = by_path(jax.jit(jax.grad(loss))(params)["adapter"])
    names = {"llama": ("self_attn.q_proj", ("attention/query",)), "gpt2": ("attn.c_attn", QKV)}
    module, paths = names[name]
    for layer in range(2):
        prefix = "model.layers" if name == "llama" else "transformer.h"
        key = f"gradient base_model.model.{prefix}.{layer}.{module}.lora_"
        downs = [leaves[f"segments/0/0/{path}/down"][layer] for path in paths]
        ups = [leaves[f"segments/0/0/{path}/up"][layer] for path in paths]
        np.testing.assert_allclose(sum(downs).T, wanted[f"{key}A.weight"], atol=1e-5)
        out = np.concatenate([np.asarray(up).reshape(len(up), -1) for up in ups], axis=1).T
        np.testing.assert_allclose(out, wanted[f"{key}B.weight"], atol=1e-5)


QKV = ("attention/query", "attention/key", "attention/value")


def restored(task: Any, workdir: Path) -> Any:
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=single), abstract(task.spec))
    return checkpoint.restore_weights(workdir, shapes)[0]


@pytest.mark.parametrize("name", FAMILIES)
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
    if name == "llama":
        theirs = safetensors.load_file(FIXTURES / name / "adapter" / WEIGHTS)
        ours = safetensors.load_file(tmp_path / "out" / WEIGHTS)
        assert {*ours} == {key for key in theirs if "base_layer" not in key}
        for key, x in ours.items():
            np.testing.assert_array_equal(x, theirs[key])


@pytest.mark.parametrize("name", FAMILIES)
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
        ({"use_dora": True}, ConfigError, "use_dora=true is not supported"),
        ({"peft_type": "IA3"}, ConfigError, 'peft_type="IA3" is not supported'),
        ({"init_lora_weights": "pissa"}, ConfigError, 'init_lora_weights="pissa"'),
        ({"modules_to_save": ["lm_head"]}, ConfigError, "modules_to_save"),
        ({"something_new": {"x": 1}}, ConfigError, "something_new"),
        ({"lora_alpha": "many"}, ConfigError, "alpha"),
        ({"alpha_pattern": {"(.*)": 3}}, ConfigError, "only names of modules"),
        ({}, CheckpointError, "for this model they must be"),
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
