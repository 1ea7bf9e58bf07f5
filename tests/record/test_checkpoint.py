"""Sealed checkpoints: exact, complete or refused."""

import concurrent.futures
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax.errors import CheckpointError
from lmjax.process import faults
from lmjax.record import checkpoint, inspect, seal
from lmjax.record.checkpoint import Checkpoints
from lmjax.record.config import CheckpointConfig
from lmjax.record.steps import SEALED, verify


@flax.struct.dataclass
class State:
    params: Any
    opt_state: Any
    hyper: Any


def make_state(seed: int = 0, width: int = 16) -> State:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": jax.random.normal(keys[0], (33, width)),
        "segments": {"0": {"query": jax.random.normal(keys[1], (2, width, width), jnp.bfloat16)}},
    }
    mask = {"embed": True, "segments": {"0": {"query": False}}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), mask))
    opt_state = jax.tree.map(lambda x: x + 1, optimizer.init(params))
    return State(params, opt_state, {"lr": jnp.float32(0.1), "seed": jnp.uint32(seed)})


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def saved(directory: Path, steps: list[int], cfg: CheckpointConfig | None = None, **values: float) -> Checkpoints:
    checkpoints = Checkpoints(directory, cfg or CheckpointConfig())
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step}, value=values.get(f"s{step}"))
    checkpoints.wait()
    return checkpoints


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def numbered(directory: Path) -> set[int]:
    return {int(name) for name in names(directory) if name.isdigit()}


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    state = make_state()
    special = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32)
    state = state.replace(params=state.params | {"special": special})
    meta = {"tokens": 10**20, "flops": 3 * 10**25, "data": {"fingerprint": "abc", "cursors": {"a": [1, 2]}}, "x": 0.1}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(7, state, meta)
    checkpoints.wait()
    restored = Checkpoints(tmp_path, CheckpointConfig()).restore(abstract(state))
    assert restored is not None
    assert_equal(restored[0], state)
    assert restored[1:] == (meta, 7)


def test_nothing_saved_restores_nothing(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "new", CheckpointConfig()).restore(abstract(make_state())) is None
    assert not (tmp_path / "new").exists()


def test_containers_do_not_matter_paths_do(tmp_path: Path) -> None:
    class Pair(NamedTuple):
        mu: Any
        nu: Any

    saved_as = {"opt": (Pair(jnp.ones(2), jnp.zeros(3)),)}
    restore_as = {"opt": [{"mu": jnp.ones(2), "nu": jnp.zeros(3)}]}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, saved_as, {})
    restored = checkpoints.restore(abstract(restore_as))
    assert restored is not None
    assert_equal(restored[0], restore_as)


def test_state_may_be_donated_and_overwritten_right_after_save(tmp_path: Path) -> None:
    @partial(jax.jit, donate_argnums=0)
    def step(tree: Any) -> Any:
        return jax.tree.map(lambda x: x * 0.5 + 1, tree)

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=10))
    tree = {"w": jax.random.normal(jax.random.key(0), (1_000_000,)), "b": jnp.arange(7.0)}
    expected = {}
    for number in range(1, 5):
        tree = step(tree)
        expected[number] = jax.tree.map(lambda x: np.array(x, copy=True), tree)
        checkpoints.save(number, tree, {})
        for _ in range(3):
            tree = step(tree)
        jax.block_until_ready(tree)
    for number, wanted in expected.items():
        restored = checkpoints.restore(abstract(tree), step=number)
        assert restored is not None
        assert_equal(jax.tree.map(np.asarray, restored[0]), wanted)


def test_a_state_that_is_saved_keeps_its_place_in_memory(tmp_path: Path) -> None:
    """Else the next step takes new memory for it, and for its own, and a process keeps both."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    state = {"params": jnp.ones((4096, 2048))}
    place = state["params"].unsafe_buffer_pointer()
    checkpoints.save(1, state, {})
    state = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    assert state["params"].unsafe_buffer_pointer() == place
    checkpoints.wait()


def test_one_save_in_flight_and_the_loop_does_not_wait_for_it(tmp_path: Path, monkeypatch: Any) -> None:
    slow = seal.write
    monkeypatch.setattr(seal, "write", lambda *args: (time.sleep(0.5), slow(*args)))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    clock = time.monotonic()
    checkpoints.save(1, {"w": jnp.ones(3)}, {})
    assert time.monotonic() - clock < 0.4
    checkpoints.poll()
    assert time.monotonic() - clock < 0.4
    checkpoints.save(2, {"w": jnp.ones(3)}, {})  # waits for the first
    assert 0.5 < time.monotonic() - clock < 1.0
    checkpoints.wait()
    assert numbered(tmp_path) == {1, 2}


def test_runs_of_one_process_save_at_once(tmp_path: Path) -> None:
    """What Orbax keeps for the whole process does not mix up their files."""

    def saves(run: int) -> None:
        checkpoints = Checkpoints(tmp_path / str(run), CheckpointConfig())
        for step in range(1, 6):
            checkpoints.save(step, {str(leaf): jnp.full(30, run * step) for leaf in range(20)}, {})
            if step == 3:
                checkpoints.restore({str(leaf): jax.ShapeDtypeStruct((30,), jnp.int32) for leaf in range(20)})
        checkpoints.wait()

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(saves, range(6)))
    for run in range(6):
        parts, _, step = checkpoint.restore_parts(tmp_path / str(run), {"7": jax.ShapeDtypeStruct((30,), jnp.int32)})
        assert step == 5 and (parts["7"] == 5 * run).all()


# Damage ---------------------------------------------------------------------------------------------------------------


def test_every_damaged_file_is_noticed_and_the_step_before_is_used(tmp_path: Path) -> None:
    saved(tmp_path / "good", [1, 2])
    files = [path.relative_to(tmp_path / "good") for path in (tmp_path / "good" / "2").rglob("*") if path.is_file()]
    assert any(path.name == seal.MANIFEST for path in files) and len(files) > 8
    rng = random.Random(0)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    def empty(path: Path) -> None:
        path.write_bytes(b"")

    full = [path for path in files if (tmp_path / "good" / path).stat().st_size]
    cases = [(flip, path) for path in full * 4][:40]
    cases += [(change, path) for path in full for change in (truncate, empty)] + [(Path.unlink, path) for path in files]
    assert {path for change, path in cases if change is flip} == set(full)
    for change, path in cases:
        work = tmp_path / "work"
        shutil.copytree(tmp_path / "good", work)
        change(work / path)
        never_sealed = (change, path.name) == (Path.unlink, seal.MANIFEST)  # as far as anybody can tell
        assert bool(verify(work)) != never_sealed, (change, path)
        restored = Checkpoints(work, CheckpointConfig()).restore(abstract(make_state()))
        assert restored is not None and restored[2] == 1, (change, path)
        assert_equal(restored[0], make_state(1))
        assert (work / "2").exists() == never_sealed, (change, path)
        shutil.rmtree(work)


def test_damage_warns_once_and_sets_aside(tmp_path: Path, caplog: Any) -> None:
    saved(tmp_path, [1, 2])
    (tmp_path / "2" / "state" / "_METADATA").write_text("{}")
    for _ in range(2):
        restored = Checkpoints(tmp_path, CheckpointConfig()).restore(abstract(make_state()))
        assert restored is not None and restored[2] == 1
    assert [record.levelname for record in caplog.records if "damaged" in record.message] == ["WARNING"]
    assert any(name.startswith("2.corrupt-") for name in names(tmp_path))


def test_named_steps_are_never_replaced_by_another(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    (tmp_path / "2" / "state" / "_METADATA").write_text("{}")
    for read in (
        lambda: checkpoints.restore(abstract(make_state()), step=2),
        lambda: checkpoint.restore_parts(tmp_path, {"params": abstract(make_state().params)}),
        lambda: inspect.inspect(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"/2 is damaged"):
            read()
    with pytest.raises(CheckpointError, match=r"no sealed checkpoint of step 5 \(sealed steps: 1, 2\)"):
        checkpoints.restore(abstract(make_state()), step=5)
    assert numbered(tmp_path) == {1, 2}


@pytest.mark.parametrize("loss", ["damage", "delete the seal", "delete the steps"])
def test_losing_every_sealed_step_is_an_error_not_a_restart(tmp_path: Path, loss: str) -> None:
    saved(tmp_path, [1, 2])
    for step in (tmp_path / "1", tmp_path / "2"):
        if loss == "damage":
            (step / "state" / "manifest.ocdbt").write_bytes(b"x")
        elif loss == "delete the seal":
            (step / seal.MANIFEST).unlink()
        else:
            shutil.rmtree(step)
    for _ in range(2):  # also when asked again, after they were set aside
        with pytest.raises(CheckpointError, match="none verifies now"):
            Checkpoints(tmp_path, CheckpointConfig()).restore(abstract(make_state()))


def test_a_first_save_that_never_finished_lets_training_start_again(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    (tmp_path / "1" / seal.MANIFEST).unlink()
    (tmp_path / SEALED).unlink()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.restore(abstract(make_state())) is None
    checkpoints.save(1, make_state(3), {})
    checkpoints.wait()
    assert names(tmp_path) == ["1", "SEALED"]
    assert verify(tmp_path) == []


def test_a_different_tree_is_refused_with_its_paths(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    good = abstract(make_state())

    def refused(changed: State) -> str:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(changed)
        assert "\n" not in str(error.value)
        return str(error.value)

    wide = abstract(make_state(width=32))
    assert "params/embed is float32[33,16] saved, float32[33,32] wanted" in refused(wide)
    cast = good.replace(hyper=good.hyper | {"lr": jax.ShapeDtypeStruct((), jnp.bfloat16)})
    assert "hyper/lr is float32[] saved, bfloat16[] wanted" in refused(cast)
    more = good.replace(params=good.params | {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert "params/bias is absent saved, float32[3] wanted" in refused(more)
    less = good.replace(params={"embed": good.params["embed"]})
    assert "params/segments/0/query is bfloat16[2,16,16] saved, absent wanted" in refused(less)
    many = good.replace(hyper={f"x{i}": jax.ShapeDtypeStruct((), jnp.float32) for i in range(20)})
    assert refused(many).count(" wanted") == 10 and "and 12 more" in refused(many)
    assert numbered(tmp_path) == {1}


# Retention and history ------------------------------------------------------------------------------------------------


def test_retention(tmp_path: Path) -> None:
    cfg = CheckpointConfig(keep_last=2, keep_every=30, keep_best=1)
    saved(tmp_path, [10, 20, 30, 40, 50, 60, 70], cfg, s10=3.0, s20=1.0, s30=2.0, s40=float("nan"), s50=4.0)
    assert numbered(tmp_path) == {20, 30, 60, 70}
    assert [row["value"] for row in inspect.inspect(tmp_path)["steps"]] == [1.0, 2.0, None, None]


def test_an_old_step_is_deleted_only_after_the_new_one_verifies(tmp_path: Path, monkeypatch: Any) -> None:
    checkpoints = saved(tmp_path, [1], CheckpointConfig(keep_last=1))
    monkeypatch.setenv("LMJAX_FAULTS", "disk_full@checkpoint.after_seal:1")
    monkeypatch.setattr(faults, "_calls", {})
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.wait()
    assert numbered(tmp_path) == {1}


def test_going_back_sets_later_steps_aside(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [10, 20, 30, 40], CheckpointConfig(keep_last=10))
    assert checkpoints.last_step == 40
    checkpoints.restore(abstract(make_state()), step=20)
    assert checkpoints.last_step == 20
    checkpoints.save(30, make_state(99), {"branch": 2})
    checkpoints.wait()
    assert numbered(tmp_path) == {10, 20, 30}
    restored = Checkpoints(tmp_path, CheckpointConfig()).restore(abstract(make_state()))
    assert restored is not None and restored[1:] == ({"branch": 2}, 30)
    aside = sorted(name.split("-")[0] for name in names(tmp_path) if "abandoned" in name)
    assert aside == ["30.abandoned", "40.abandoned"]


# Failing storage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["checkpoint.write", "checkpoint.before_seal"])
@pytest.mark.parametrize("how", ["wait", "poll", "save"])
def test_a_failed_save_is_an_error_at_the_next_call(tmp_path: Path, monkeypatch: Any, hook: str, how: str) -> None:
    checkpoints = saved(tmp_path, [1])
    monkeypatch.setenv("LMJAX_FAULTS", f"disk_full@{hook}:1")
    monkeypatch.setattr(faults, "_calls", {})
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(CheckpointError, match=r"2 was not saved: No space left.*needs up to [0-9.]+ kB, .* GB free"):
        if how == "wait":
            checkpoints.wait()
        elif how == "save":
            checkpoints.save(3, make_state(3), {})
        else:
            while True:
                checkpoints.poll()
                time.sleep(0.01)
    assert names(tmp_path) == ["1", "SEALED"]
    checkpoints.save(3, make_state(3), {})  # once the storage is well again
    checkpoints.wait()
    assert numbered(tmp_path) == {1, 3}


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    def big(seed: int) -> Any:
        return {"w": jax.random.normal(jax.random.key(seed), (1_200_000,))}

    checkpoints = Checkpoints(small_disk / "checkpoints", CheckpointConfig(keep_last=5))
    checkpoints.save(1, big(1), {})
    checkpoints.save(2, big(2), {})
    checkpoints.save(3, big(3), {})
    with pytest.raises(CheckpointError, match="was not saved"):
        checkpoints.wait()
    assert numbered(small_disk / "checkpoints") == {1, 2}
    assert not [name for name in names(small_disk / "checkpoints") if "tmp" in name]
    restored = checkpoints.restore(abstract(big(0)))
    assert restored is not None and restored[2] == 2
    assert_equal(restored[0], big(2))


def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="was not saved"):
        Checkpoints(tmp_path / "file" / "checkpoints", CheckpointConfig()).save(1, make_state(), {})


# Kills ----------------------------------------------------------------------------------------------------------------

CHILD = textwrap.dedent("""
    import sys
    import jax, numpy as np
    from lmjax.record.checkpoint import Checkpoints
    from lmjax.record.config import CheckpointConfig

    def state(step):
        tree = {"w": np.random.default_rng(step).random(300_000, np.float32), "step": np.int32(step)}
        return jax.tree.map(jax.numpy.asarray, tree)

    checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=2))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
    found = checkpoints.restore(abstract)
    start = 0
    if found is not None:
        restored, meta, start = found
        assert int(restored["step"]) == start == meta["step"]
        assert bool((restored["w"] == state(start)["w"]).all())
    print("start", start, flush=True)
    for step in range(start + 1, start + 1 + int(sys.argv[2])):
        checkpoints.save(step, state(step), {"step": step})
        if step % 3 == 0 or step == start + 1:
            checkpoints.wait()
            print("sealed", step, flush=True)
    checkpoints.wait()
    print("sealed", step, flush=True)
""")


def run_child(directory: Path, steps: int, faults: str = "", kill_after: float | None = None) -> tuple[int, list[str]]:
    environment = os.environ | {"LMJAX_FAULTS": faults, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHILD, str(directory), str(steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    lines = [process.stdout.readline().strip()]
    if kill_after is not None:
        lines.append(
            process.stdout.readline().strip()
        )  # the first step is sealed: from here on saves take milliseconds
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    lines += process.stdout.read().split("\n")
    return process.wait(), [line for line in lines if line]


def last_sealed(lines: list[str]) -> int:
    return max((int(line.split()[1]) for line in lines if line.startswith("sealed")), default=0)


def test_kill_at_each_stage_of_a_save(tmp_path: Path) -> None:
    """Each child dies in its third save; the next one checks what it finds and goes on from there."""
    start = 0
    stages = {"checkpoint.write": 2, "checkpoint.before_seal": 2, "checkpoint.after_seal": 3, "checkpoint.retain": 3}
    for hook, advance in stages.items():
        code, lines = run_child(tmp_path, 5, f"kill@{hook}:3")
        assert (code, lines[0]) == (-signal.SIGKILL, f"start {start}"), hook
        start += advance
    code, lines = run_child(tmp_path, 2)
    assert (code, lines[0]) == (0, f"start {start}")
    assert names(tmp_path) == sorted([str(start + 1), str(start + 2), "SEALED"])
    assert verify(tmp_path) == []


def kill_at_random_times(directory: Path, times: int, seed: int) -> None:
    rng = random.Random(seed)
    reached = 0
    for _ in range(times):
        code, lines = run_child(directory, 10_000, kill_after=rng.uniform(0.0, 0.5))
        assert code == -signal.SIGKILL
        assert int(lines[0].split()[1]) >= reached  # the child checked the contents
        assert last_sealed(lines) > reached
        reached = last_sealed(lines)
    code, lines = run_child(directory, 2)
    assert code == 0 and int(lines[0].split()[1]) >= reached
    assert len(names(directory)) == 3


def test_kill_at_random_times(tmp_path: Path) -> None:
    kill_at_random_times(tmp_path, 2, seed=0)


@pytest.mark.slow
def test_kill_at_many_random_times(tmp_path: Path) -> None:
    kill_at_random_times(tmp_path, 25, seed=1)


# Inspection -----------------------------------------------------------------------------------------------------------


def test_parts_and_inspection(tmp_path: Path) -> None:
    state = make_state(1)
    saved(tmp_path / "checkpoints", [1])
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "1"):
        parts, meta, step = checkpoint.restore_parts(path, {"params": abstract(state.params)})
        assert_equal(parts, {"params": state.params})
        assert (meta, step) == ({"step": 1}, 1)
    report = inspect.inspect(tmp_path)
    assert report["leaves"]["params/embed"] == [[33, 16], "float32"]
    assert report["parts"]["params"] == (2, 33 * 16 + 2 * 16 * 16, 33 * 16 * 4 + 2 * 16 * 16 * 2)
    json.dumps(report)
    text = inspect.format_inspection(report)
    assert "params/segments/0/query" in text and "bfloat16" in text


def test_content_hashes_depend_on_contents_alone(tmp_path: Path) -> None:
    saved(tmp_path / "a", [1, 2])
    checkpoints = Checkpoints(tmp_path / "b", CheckpointConfig(keep_last=9))
    checkpoints.save(5, make_state(1), {"other": "meta"})
    changed = make_state(1)
    checkpoints.save(6, changed.replace(hyper=changed.hyper | {"lr": jnp.float32(0.2)}), {})
    checkpoints.wait()
    one = inspect.inspect(tmp_path / "a", step=1, hashes=True)["hashes"]
    two = inspect.inspect(tmp_path / "a", step=2, hashes=True)["hashes"]
    same = inspect.inspect(tmp_path / "b", step=5, hashes=True)["hashes"]
    other = inspect.inspect(tmp_path / "b", step=6, hashes=True)["hashes"]
    assert one == same
    assert one["params"] != two["params"]
    assert (other["params"], other["hyper"] == one["hyper"]) == (one["params"], False)


def test_altered_manifests_never_pass_or_crash(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    manifest = tmp_path / "1" / seal.MANIFEST
    good = manifest.read_bytes()
    rng = random.Random(0)
    texts = [b"", b"null", b"[]", b'{"self": 1}', b"[" * 100_000, b'{"self":"x","files":{"../../etc/passwd":["",1]}}']
    for _ in range(300):
        data = bytearray(good)
        start = rng.randrange(len(data))
        data[start : start + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
        texts.append(bytes(data))
    for text in texts:
        manifest.write_bytes(text)
        assert text == good or verify(tmp_path), text


# Meshes ---------------------------------------------------------------------------------------------------------------

MESHES = textwrap.dedent("""
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from lmjax.record import apart
    from lmjax.record.checkpoint import Checkpoints
    from lmjax.record.config import CheckpointConfig
    from lmjax.record.inspect import inspect

    apart._LARGE = 0  # small arrays as large ones are
    tree = {"w": np.random.default_rng(0).random((16, 12), np.float32), "b": np.arange(8, dtype=np.int32),
            "count": np.int32(7)}
    hashes = set()
    for number, (shape, w, b) in enumerate([((4, 1), P("a", "b"), P("a")), ((2, 2), P("b", "a"), P(("a", "b"))),
                                            ((1, 4), P(None, "b"), P()), ((1, 1), P(), P())]):
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, ("a", "b"), devices=devices)
        shardings = {"w": NamedSharding(mesh, w), "b": NamedSharding(mesh, b), "count": NamedSharding(mesh, P())}
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
        checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=9))
        if number == 0:
            state = jax.tree.map(jax.device_put, tree, shardings)
        else:
            state, _, step = checkpoints.restore(abstract)
            assert step == number - 1
        for name, leaf in state.items():
            assert leaf.sharding == shardings[name], (leaf.sharding, shardings[name])
            assert (np.asarray(leaf) == tree[name]).all()
        checkpoints.save(number, state, {})
        checkpoints.wait()
        hashes.add(str(inspect(sys.argv[1], hashes=True)["hashes"]))
    assert len(hashes) == 1
""")


def test_any_mesh_restores_onto_any_other_with_the_same_content_hash(tmp_path: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", MESHES, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
