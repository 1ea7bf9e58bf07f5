"""What a teacher said, stored: gradients against PyTorch, what students learn by it, goes on to the bit, damage."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lmjax.__main__ import parse
from lmjax.config import Config
from lmjax.errors import DONE, PREEMPTED, ConfigError, DataError
from lmjax.finetune import teach as teaching
from lmjax.finetune.distill import distill
from lmjax.finetune.stored import FILE, Store
from lmjax.finetune.teach import teach
from lmjax.losses import DIVERGENCES, Likeliest, Output, likeliest, token_divergences
from lmjax.process import faults as fault_hooks
from lmjax.record.inspect import inspect
from lmjax.record.tracking import read_jsonl
from lmjax.run import run
from lmjax.run.trained import load_trained
from tests.finetune.lessons import CONFIG, STEPS, settings, tiny

pytest.importorskip("jinja2")
pytestmark = pytest.mark.usefixtures("quick_compilation", "compile_cache")

TOP = 12
SAMPLES = STEPS * 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher and what it said of the samples of its students."""
    place = tmp_path_factory.mktemp("teach")
    assert run.run(tiny(place, "model.embed=32", "model.layers=1"), place / "teacher", run.Options()) == DONE
    teach(asking(place), epath.Path(place / "said"), top=TOP)
    return place


def asking(place: Path, *more: str) -> Config:
    return tiny(place, "task=distill", f"train.distill.teacher={place / 'teacher'}", *more)


def student(place: Path, *more: str) -> Config:
    return tiny(place, "task=distill", f"train.distill.stored={place / 'said'}", *more)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_rest_counts_as_one_token_and_gradients_are_those_of_torch(name: str) -> None:
    """For any size of chunk; it is never further than the whole distributions are, and 0 for one that knows as much."""
    torch = pytest.importorskip("torch")
    B, T, D, V, K, temperature = 2, 7, 5, 11, 3, 2.5
    rng = np.random.default_rng(0)
    x_BTD, theirs_BTD = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    head_DV, teacher_DV = (2 * rng.normal(size=(D, V)).astype(np.float32) for _ in range(2))
    targets_BT = rng.integers(V, size=(B, T))

    x, head = (torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in (x_BTD, head_DV))
    p = torch.softmax(torch.tensor(theirs_BTD @ teacher_DV).double() / temperature, -1)
    q = torch.softmax(x @ head / temperature, -1)
    top = p.topk(K).indices

    def grouped(p: Any) -> Any:
        kept = p.gather(-1, top)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)

    def kl(p: Any, q: Any) -> Any:
        return (p * (p / q).log()).sum(-1)

    def divergence(p: Any, q: Any) -> Any:
        m = (p + q) / 2
        return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jensen_shannon": (kl(p, m) + kl(q, m)) / 2}[name]

    expected = divergence(grouped(p), grouped(q))
    assert (expected <= divergence(p, q) + 1e-6).all()
    expected.sum().backward()

    def unembed(head_DV: Any, x_BTD: Any) -> Any:
        return x_BTD @ head_DV

    def far(head_DV: Any, x_BTD: Any, known: Likeliest, chunk: int) -> Any:
        found = token_divergences(
            known,
            Output(unembed, head_DV, x_BTD),
            jnp.asarray(targets_BT),
            divergence=name,
            temperature=temperature,
            chunk=chunk,
        )
        return found[0].sum(), found[0]

    for chunk in (3, 100):
        teacher = Output(unembed, jnp.asarray(teacher_DV), jnp.asarray(theirs_BTD))
        known = likeliest(teacher, K=K, temperature=temperature, chunk=chunk)
        np.testing.assert_array_equal(known.tokens_BTK, top)
        np.testing.assert_allclose(jnp.exp(known.logp_BTJ), grouped(p), rtol=1e-5, atol=1e-6)
        measure = jax.value_and_grad(far, argnums=(0, 1), has_aux=True)
        (_, found), gradients = measure(head_DV, x_BTD, known, chunk)
        np.testing.assert_allclose(found, expected.detach(), rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(gradients, (head.grad, x.grad), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert abs(far(teacher_DV, theirs_BTD, known, chunk)[1]).max() < 1e-5


def test_what_is_stored_is_what_the_teacher_says(place: Path) -> None:
    """Of every sample, under the number by which training reads it, as its own logits have it."""
    task, teacher, store = distill(asking(place)), load_trained(place / "teacher"), Store(epath.Path(place / "said"))
    logits = jax.jit(teacher.scorer.logits)
    assert task.source is not None and store.manifest.samples == SAMPLES
    for first in (0, 20):
        batch = next(iter(task.source(rows=np.arange(4), at=first)))
        said = store.read(first + np.arange(4))
        places = {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}
        logits_BTV = logits(teacher.params, batch.tokens_BT, **places)
        log_p = np.asarray(jax.nn.log_softmax(logits_BTV), np.float64)[batch.segments_BT >= 0]
        tokens, logp = (np.asarray(x)[batch.segments_BT >= 0] for x in said)
        np.testing.assert_allclose(np.take_along_axis(log_p, tokens, -1), logp[:, :-1], rtol=2e-3, atol=2e-3)
        assert (logp[:, :-2] >= logp[:, 1:-1]).all()
        assert (np.sort(log_p, -1)[:, -TOP] <= logp[:, -2] + 2e-3 * abs(logp[:, -2])).all()
        np.testing.assert_allclose(np.exp(logp.astype(np.float64)).sum(-1), 1, atol=2e-3)


def test_a_student_learns_by_it_and_is_read_without_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts no further from what is stored than from the teacher, comes closer, and is resumed to the bit; what
    another teacher said is not gone on with."""

    def train(name: str, cfg: Config, faults: str = "") -> int:
        monkeypatch.setenv("LMJAX_FAULTS", faults)
        monkeypatch.setattr(fault_hooks, "_calls", {})
        return run.run(cfg, tmp_path / name, run.Options())

    assert train("whole", student(place)) == train("asking", asking(place)) == DONE
    assert train("stopped", student(place), "terminate@step:5") == PREEMPTED
    assert train("stopped", student(place)) == DONE
    whole, stopped = (inspect(tmp_path / name, hashes=True) for name in ("whole", "stopped"))
    assert whole["hashes"] == stopped["hashes"]
    stored, asked = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "asking"))
    far, far_from_all = (
        [row["train/divergence"] for row in rows if "train/divergence" in row] for rows in (stored, asked)
    )
    assert far[0] <= far_from_all[0] * 1.001 and far[-1] < far[0]
    np.testing.assert_allclose(stored[0]["train/loss"], asked[0]["train/loss"], rtol=1e-5)  # before the first update
    aside = (place / "said").rename(tmp_path / "aside")
    try:
        assert load_trained(tmp_path / "whole").params["embed"].shape == (257, 16)
    finally:
        aside.rename(place / "said")
    assert train("other", student(place), "terminate@step:5") == PREEMPTED
    teach(asking(place, "train.distill.temperature=1.0"), epath.Path(tmp_path / "fewer"), top=3)
    with pytest.raises(DataError, match="fewer is not what this run was taught by"):
        train("other", tiny(place, "task=distill", f"train.distill.stored={tmp_path / 'fewer'}"))


def test_what_is_interrupted_goes_on_to_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece; and more samples are added to those that are there."""
    monkeypatch.setattr(teaching, "_PIECE_BYTES", 1)  # a batch makes a piece
    whole, cut = (epath.Path(tmp_path / name) for name in ("whole", "cut"))
    teach(asking(place), whole, top=TOP)
    assert len(Store(whole).manifest.pieces) == STEPS
    write = teaching.write_piece
    monkeypatch.setattr(teaching, "write_piece", lambda *args: write(*args) if len(args[1].pieces) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teach(asking(place), cut, top=TOP)
    monkeypatch.setattr(teaching, "write_piece", write)
    with pytest.raises(ConfigError, match="cut holds 12 samples, and the run reads 32; continue it by lmjax teach"):
        run.run(tiny(place, "task=distill", f"train.distill.stored={cut}"), tmp_path / "run", run.Options())
    teach(asking(place), cut, top=TOP, samples=20)
    assert Store(cut).manifest.samples == 20
    teach(asking(place), cut, top=TOP)
    assert files(Path(cut)) == files(Path(whole))
    before, one = files(Path(cut)), Store(epath.Path(place / "said")).read(np.arange(SAMPLES))
    assert teach(asking(place), cut, top=TOP, samples=8).samples == SAMPLES  # it is there
    assert files(Path(cut)) == before
    for ours, theirs in zip(Store(cut).read(np.arange(SAMPLES)), one, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_command_and_verify(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--config.{one}" for one in settings(place, "task=distill", f"train.distill.teacher={place / 'teacher'}")]
    arguments = parse(["teach", f"--config={CONFIG}", f"--out={tmp_path / 'said'}", f"--top={TOP}", *flags])
    assert arguments.function(arguments) == 0
    assert "said: 32 samples; train with --config.train.distill.stored=" in capsys.readouterr().out
    assert files(tmp_path / "said") == files(place / "said")
    verifying = parse(["verify", str(tmp_path / "said")])
    assert verifying.function(verifying) == 0
    path = tmp_path / "said" / "00000.logp"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"00000\.logp is damaged"):
        verifying.function(verifying)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("00000.tokens", lambda content: content[:-2], "00000.tokens is missing or not of"),
        ("00000.logp", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "00000.logp is damaged"),
        (FILE, lambda content: content.replace(b'"top": 12', b'"top": 11'), "damaged .its content is not what was"),
        (FILE, lambda content: b"", "is damaged"),
        (FILE, None, "holds nothing that a teacher said"),
    ],
)
def test_damage_is_named(place: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    for path in (place / "said").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink() if change is None else (tmp_path / name).write_bytes(change(content))
    cfg = tiny(place, "task=distill", f"train.distill.stored={tmp_path}")
    with pytest.raises(DataError, match=message) as caught:
        run.run(cfg, tmp_path / "run", run.Options())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (("data.seed=1",), DataError, "said is of other samples than this run's"),
        (("data.seq_len=208",), DataError, "said is of other samples than this run's"),
        (("train.steps=9",), ConfigError, "said holds 32 samples, and the run reads 36"),
        (("train.distill.temperature=2.0",), ConfigError, r"was said at train.distill.temperature=1.0, not 2.0"),
        (("model.vocab=300",), ConfigError, "tells 257 tokens apart, and model.vocab=300"),
    ],
)
def test_what_was_said_of_something_else_is_refused(
    place: Path, tmp_path: Path, more: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        run.run(student(place, *more), tmp_path / "run", run.Options())
    assert "\n" not in str(caught.value)


def test_what_cannot_be_stored_is_named(place: Path, tmp_path: Path) -> None:
    said = epath.Path(place / "said")
    with pytest.raises(DataError, match="said holds what another teacher said, or of other samples"):
        teach(asking(place, f"train.distill.teacher={place / 'teacher'}@4"), said, top=TOP)
    with pytest.raises(DataError, match="or of other samples, at another temperature or --top"):
        teach(asking(place), said, top=TOP + 1)
    with pytest.raises(ConfigError, match="--top=257 is not below the 257 tokens"):
        teach(asking(place), epath.Path(tmp_path / "said"), top=257)
    with pytest.raises(ConfigError, match="lmjax teach reads a config with task=distill"):
        teach(student(place), epath.Path(tmp_path / "said"), top=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("own")
    with pytest.raises(DataError, match="mine holds other files"):
        teach(asking(place), epath.Path(tmp_path / "mine"), top=4)
