"""Distillation: gradients against PyTorch, masks and microbatches exact, the teacher untouched, resumed to the bit."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import Config
from lmjax.devices.place import local_rows
from lmjax.errors import DONE, PREEMPTED, CheckpointError, ConfigError
from lmjax.finetune.distill import distill
from lmjax.losses import DIVERGENCES, Output, token_divergences
from lmjax.process import faults as fault_hooks
from lmjax.record.inspect import inspect
from lmjax.record.tracking import read_jsonl
from lmjax.run import assemble, run
from lmjax.run.trained import load_trained
from lmjax.train.step import accumulate, sample_keys
from tests.finetune.lessons import STEPS, tiny
from tests.hf.test_convert import tokenizer_json

pytest.importorskip("jinja2")
pytestmark = pytest.mark.usefixtures("quick_compilation", "compile_cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, wider than its students."""
    place = tmp_path_factory.mktemp("distill")
    cfg = tiny(place, "model.embed=32", "model.layers=1")
    assert run.run(cfg, place / "teacher", run.Options()) == DONE
    return place


def student(place: Path, *more: str) -> Config:
    return tiny(place, "task=distill", f"train.distill.teacher={place / 'teacher'}@{STEPS}", *more)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_and_their_gradients_are_those_of_torch(name: str, temperature: float) -> None:
    """For any size of chunk, by the student's activations and its head; none goes to the teacher."""
    torch = pytest.importorskip("torch")
    kl = torch.nn.functional.kl_div
    B, T, D, V = 2, 7, 5, 11
    rng = np.random.default_rng(0)
    x_BTD, theirs_BTD = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    head_DV, teacher_DV = (2 * rng.normal(size=(D, V)).astype(np.float32) for _ in range(2))
    weights_BT, targets_BT = rng.random((B, T)).astype(np.float32), rng.integers(V, size=(B, T))

    x, head = (torch.tensor(one, requires_grad=True) for one in (x_BTD, head_DV))
    log_q = torch.log_softmax(x @ head / temperature, -1)
    log_p = torch.log_softmax(torch.tensor(theirs_BTD @ teacher_DV) / temperature, -1)
    log_m = torch.logaddexp(log_p, log_q) - np.log(2)

    def torch_kl(of: Any, by: Any) -> Any:  # KL(of, by)
        return kl(by, of, reduction="none", log_target=True).sum(-1)

    expected = {
        "forward_kl": torch_kl(log_p, log_q),
        "reverse_kl": torch_kl(log_q, log_p),
        "jensen_shannon": (torch_kl(log_p, log_m) + torch_kl(log_q, log_m)) / 2,
    }[name]
    (expected * torch.tensor(weights_BT)).sum().backward()

    def far(head_DV: Any, x_BTD: Any, chunk: int) -> Any:
        def unembed(head_DV: Any, x_BTD: Any) -> Any:
            return x_BTD @ head_DV

        teacher = Output(unembed, jnp.asarray(teacher_DV), jnp.asarray(theirs_BTD))
        found = token_divergences(
            teacher,
            Output(unembed, head_DV, x_BTD),
            jnp.asarray(targets_BT),
            divergence=name,
            temperature=temperature,
            chunk=chunk,
        )
        return (found[0] * weights_BT).sum(), found

    for chunk in (1, 3, 100):
        (_, found), gradients = jax.value_and_grad(far, argnums=(0, 1), has_aux=True)(head_DV, x_BTD, chunk)
        np.testing.assert_allclose(found[0], expected.detach(), rtol=1e-4, atol=1e-6)
        labels = torch.log_softmax(x @ head, -1).detach().gather(-1, torch.tensor(targets_BT)[..., None])[..., 0]
        np.testing.assert_allclose(found[1], labels, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(gradients, (head.grad, x.grad), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_is_what_its_formula_says(place: Path) -> None:
    """From the logits of both, over the scored tokens of a batch, however it is cut; the labels have the rest."""
    cfg = student(place, "train.distill.share=0.7", "train.distill.temperature=2.0")
    experiment = assemble.assemble(distill(cfg))
    task, state, frozen = experiment.task, assemble.initial_state(experiment), assemble.frozen_params(experiment)
    assert task.source is not None and task.language is not None
    batch = next(iter(task.source(rows=local_rows(None, 4), at=0)))
    keys_B = sample_keys(state.hyper["seed"], batch.ids_B)

    def pieces(microbatches: int) -> Any:
        return jax.jit(
            lambda state, frozen, batch: accumulate(task.objective, state, frozen, batch, keys_B, microbatches)
        )(state, frozen, batch)

    (whole, metrics), (cut, again) = pieces(1), pieces(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max())), whole, cut)
    for name, (total, weight) in metrics.items():
        np.testing.assert_allclose(again[name], (total, weight), rtol=1e-5)

    teacher = load_trained(place / "teacher")
    places = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
    ours_BTV = jax.jit(task.language.scorer.logits)(state.params, batch.tokens_BT, **places)
    theirs_BTV = jax.jit(teacher.scorer.logits)(teacher.params, batch.tokens_BT, **places)
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x / 2.0), np.float64) for x in (theirs_BTV, ours_BTV))
    far = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * batch.weights_BT).sum()
    labels_BTV = np.asarray(jax.nn.log_softmax(ours_BTV), np.float64)
    nll = -(np.take_along_axis(labels_BTV, batch.targets_BT[..., None], -1)[..., 0] * batch.weights_BT).sum()
    np.testing.assert_allclose(metrics["divergence"], (far, batch.weights_BT.sum()), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], (nll, batch.weights_BT.sum()), rtol=1e-4)
    minimized, _ = jax.jit(task.objective.loss)(state.params, frozen, batch, keys_B, state.hyper)
    np.testing.assert_allclose(minimized, 0.7 * 4 * far + 0.3 * nll, rtol=1e-4)


def learns_stopped_or_not(cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train `whole` in one go, and `stopped` in two, to the same bits."""

    def train(name: str, faults: str = "") -> int:
        monkeypatch.setenv("LMJAX_FAULTS", faults)
        monkeypatch.setattr(fault_hooks, "_calls", {})
        return run.run(cfg, tmp_path / name, run.Options())

    assert train("whole") == DONE
    assert train("stopped", "terminate@step:5") == PREEMPTED and train("stopped") == DONE
    whole, stopped = (inspect(tmp_path / name, hashes=True) for name in ("whole", "stopped"))
    assert whole["hashes"] == stopped["hashes"]
    rows = [row for row in read_jsonl(tmp_path / "whole" / "metrics.jsonl") if "train/divergence" in row]
    assert rows[-1]["train/divergence"] < rows[0]["train/divergence"]


def test_a_student_is_trained_stopped_and_read_without_its_teacher(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = student(place)
    learns_stopped_or_not(cfg, tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"train\.distill\.share was 1\.0, now 0\.5"):
        run.run(student(place, "train.distill.share=0.5"), tmp_path / "whole", run.Options())
    aside = shutil.move(place / "teacher", tmp_path / "aside")
    try:
        with pytest.raises(ConfigError, match="is not the work directory of a run"):
            distill(cfg)
        assert load_trained(tmp_path / "whole").params["embed"].shape == (257, 16)
        assert run.run(cfg, tmp_path / "whole", run.Options()) == DONE  # it is finished
    finally:
        shutil.move(aside, place / "teacher")


@pytest.mark.slow
def test_adapters_of_a_student_learn_from_a_teacher(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand on the student's own base, are resumed to the bit, and are read without the teacher."""
    base = tmp_path / "base"
    assert run.run(tiny(place, "train.steps=4"), base, run.Options()) == DONE
    lora = ("tune.adapter.rank=2", "tune.adapter.targets=('segments/*','embed')")
    cfg = student(place, f"train.init_from={base}", *lora)
    learns_stopped_or_not(cfg, tmp_path, monkeypatch)
    aside = shutil.move(place / "teacher", tmp_path / "aside")
    try:
        assert np.abs(load_trained(tmp_path / "whole").params["final_norm"]["scale"]).sum() > 0
    finally:
        shutil.move(aside, place / "teacher")
    seal = next((tmp_path / "whole" / "checkpoints" / str(STEPS)).glob("LMJAX_MANIFEST*"))
    assert len(json.loads(seal.read_text())["meta"]["base"].split("+")) == 2  # its base and its teacher
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"stands on the weights of .*, which are not there any more"):
        load_trained(tmp_path / "whole")


def test_a_checkpoint_of_hugging_face_teaches(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers computes it; another tokenizer, other weights in its place and a damaged one are refused."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=260, **sizes)).float()
    theirs.save_pretrained(tmp_path / "theirs")
    cfg = student(place, f"train.distill.teacher={tmp_path / 'theirs'}")
    task = distill(cfg)
    assert task.cfg.model.vocab == 260 and task.cfg.train.distill is not None
    assert re.fullmatch(r".*/theirs@[0-9a-f]{32}", task.cfg.train.distill.teacher)
    experiment = assemble.assemble(task)
    state, frozen = assemble.initial_state(experiment), assemble.frozen_params(experiment)
    assert task.source is not None and task.language is not None
    batch = next(iter(task.source(rows=local_rows(None, 4), at=0)))
    first_T = batch.segments_BT[0] == 0  # one document, as transformers reads it
    tokens = torch.tensor(batch.tokens_BT[0][first_T][None].astype(np.int64))
    log_p = torch.log_softmax(theirs(tokens).logits[0].double(), -1).detach().numpy()
    places = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
    ours_BTV = jax.jit(task.language.scorer.logits)(state.params, batch.tokens_BT, **places)
    log_q = np.asarray(jax.nn.log_softmax(ours_BTV[0]), np.float64)[first_T]
    weights_T = batch.weights_BT[0] * first_T
    alone = dataclasses.replace(batch, weights_BT=batch.weights_BT * 0 + np.pad(weights_T[None], ((0, 3), (0, 0))))
    _, metrics = jax.jit(task.objective.loss)(state.params, frozen, alone, None, state.hyper)
    expected = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * weights_T[first_T]).sum()
    np.testing.assert_allclose(metrics["divergence"], (expected, weights_T.sum()), rtol=1e-4)

    assert run.run(cfg, tmp_path / "run", run.Options()) == DONE
    (tmp_path / "run" / "summary.json").unlink()
    shutil.copytree(tmp_path / "theirs", tmp_path / "kept")
    transformers.LlamaForCausalLM(theirs.config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"train\.distill\.teacher=.*theirs no longer holds the weights"):
        run.run(cfg, tmp_path / "run", run.Options())
    (tmp_path / "kept" / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "kept" / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    with pytest.raises(ConfigError, match=r"train\.distill\.teacher=.*kept was trained with another tokenizer"):
        distill(student(place, f"train.distill.teacher={tmp_path / 'kept'}"))


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(place: Path, on_eight_devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMJAX_TEST_TEACHER", str(place))
    on_eight_devices(Path(__file__).with_name("distill_devices.py"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("train.distill.teacher=runs/x",), r"train\.distill\.teacher=runs/x: .*/x is not the work directory of a run"),
        (("train.distill=None",), r"task=distill needs train\.distill\.teacher, another run"),
        (("train.distill.stored=x",), r"task=distill needs .* or else train\.distill\.stored"),
        (("train.loss.z_weight=0.1",), r"train\.loss\.z_weight and train\.loss\.name have no part in task=distill"),
        (("model.moe.experts=4",), "task=distill trains dense models"),
        (("task=instruct",), "train.distill is of task=distill, not instruct"),
        (("model.vocab=300",), "tells 257 tokens apart, and model.vocab=300"),
        (("train.distill.divergence=kl",), "there is no 'kl'"),
    ],
)
def test_what_does_not_fit_is_named_before_a_step(
    place: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run.run(student(place, *more), tmp_path / "run", run.Options())
    assert "\n" not in str(caught.value)


def test_a_step_that_the_teacher_does_not_have_is_named(place: Path, tmp_path: Path) -> None:
    cfg = student(place)
    settings = dataclasses.replace(cfg.train.distill, teacher=f"{place / 'teacher'}@5")  # type: ignore[type-var]
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, distill=settings))
    with pytest.raises(ConfigError, match="no sealed checkpoint of step 5"):
        run.run(cfg, tmp_path / "run", run.Options())
