"""Planning for hardware that is not here: on fake CPUs always, for TPUs where libtpu is installed."""

import functools
import importlib.util
import itertools
import json
import math
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lmjax.config import Config, parse
from lmjax.devices import chips
from lmjax.devices.chips import GIB, Chip
from lmjax.devices.config import MeshConfig
from lmjax.devices.mesh import LAYOUTS, axis_sizes
from lmjax.errors import ConfigError
from lmjax.plan import memory, roofline, search, step, table, topology
from lmjax.plan.collectives import Collective

ROOT = Path(__file__).parents[2]
TINY = {
    "model": {"vocab": 64, "layers": 3, "embed": 32, "heads": 4, "kv_heads": 4, "mlp": 64, "context": 16},
    "data": {"seq_len": 16},
    "train": {"batch": 8, "steps": 1000},
    "optimizer": {"schedule": {"warmup": 5}},
}
FLAGS = [f"--config.{part}.{name}={value}" for part in ("model", "data") for name, value in TINY[part].items()]
pytestmark = pytest.mark.usefixtures("quick_compilation")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs lmjax[tpu]")


def lmjax_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: it decides how many devices JAX has."""
    command = [sys.executable, "-m", "lmjax", "plan", f"--config={ROOT / 'configs/llama.py'}:60m", *FLAGS, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def plan_on_one_cpu(cfg: Config) -> step.Plan:
    target = topology.parse("cpu-1")
    return step.make_plan(cfg, target, topology.devices(target))


@pytest.fixture(scope="module")
def tiny() -> step.Plan:
    return plan_on_one_cpu(parse(TINY))


# Names of topologies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "chips_", "shape", "slices", "wraps"),
    [
        ("v5e-256", 256, (16, 16), 1, True),
        ("v5e-8", 8, (2, 4), 1, False),
        ("v5litepod-16", 16, (4, 4), 1, False),
        ("v6e-1", 1, (1, 1), 1, False),
        ("v4-8", 4, (2, 2, 1), 1, False),
        ("v5p-256", 128, (4, 4, 8), 1, True),
        ("v5p:4x8x8", 256, (4, 8, 8), 1, True),
        ("v5p-2048", 1024, (8, 8, 16), 1, True),
        ("tpu7x-128", 64, (4, 4, 4), 1, True),
        ("2xv5e-256", 512, (16, 16), 2, True),
        ("cpu-8", 8, (8,), 1, False),
    ],
)
def test_names(name: str, chips_: int, shape: tuple[int, ...], slices: int, wraps: bool) -> None:
    found = topology.parse(name)
    assert (found.chips, found.shape, found.slices) == (chips_, shape, slices)
    assert found.family == "cpu" or set(found.wraps) == {wraps}
    assert found.devices == chips_ * (2 if found.family == "tpu7x" else 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-100", r"v5e-64 \(8x8\) and v5e-128 \(8x16\)"),
        ("v5e-512", r"the nearest is v5e-256 \(16x16\)"),
        ("v5p-7", r"the nearest is v5p-8 \(2x2x1\)"),
        ("v5p-100", r"v5p-64 \(2x4x4\) and v5p-128 \(4x4x4\)"),
        ("v5p:3x3x3", r"v5p-32 \(2x2x4\) and v5p-64 \(2x4x4\)"),
        ("h100-8", "the families are v4, v5e"),
        ("v5e", "FAMILY-SIZE"),
        ("0xv5e-4", "no slice"),
        ("cpu-0", "no device"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        topology.parse(name)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_on_eight_devices(on_eight_devices: Callable[..., None]) -> None:
    on_eight_devices(Path(__file__).parent / "eight_devices.py")


@pytest.mark.parametrize(("xla_peak", "beyond"), [(100, 0), (150, 0), (500, 350)])
def test_the_rows_add_up_and_cover_xla_s_own_peak(xla_peak: int, beyond: int, tiny: step.Plan) -> None:
    stats = SimpleNamespace(
        argument_size_in_bytes=70,
        temp_size_in_bytes=60,
        output_size_in_bytes=45,
        alias_size_in_bytes=40,
        generated_code_size_in_bytes=15,
        peak_memory_in_bytes=xla_peak,
    )
    declared = memory.Memory(params=10, optimizer=20, inputs=30, gradients=10, activations=80)
    found = memory.of_compiled(declared, SimpleNamespace(memory_analysis=lambda: stats))
    assert (found.peak, found.beyond, found.padding) == (max(150, xla_peak), beyond, 10)
    for one in (found, tiny.memory):
        rows = one._asdict()
        among_temporaries = rows.pop("gradients"), rows.pop("activations")
        assert all(among_temporaries) and rows.pop("peak") == sum(rows.values())
    text = "\n".join(table.lines(tiny._replace(memory=found)))
    assert ("more at XLA's own peak" in text) == (beyond > 0)


def test_what_cannot_fit_is_said_with_its_largest_arrays(tiny: step.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.fits and "no limit is known" in table.verdict(tiny)
    compiled = tiny._replace(chip=Chip(1e12, hbm=tiny.needed - 1, hbm_bandwidth=1e11, link=1e9))
    assert not compiled.fits and "too much" in table.verdict(compiled)
    assert compiled._replace(chip=Chip(1e12, hbm=tiny.needed)).fits
    monkeypatch.setattr(chips, "CHIPS", {"cpu": Chip(1e12, hbm=1000.0)})
    hopeless = plan_on_one_cpu(tiny.cfg)
    assert hopeless.compiled is None and not hopeless.fits
    text = "\n".join(table.lines(hopeless))
    assert "does not fit: at least" in text and "state/params/segments/0/0/mlp/up" in text
    assert not table.as_json(hopeless)["fits"]


OUT_OF_MEMORY = """\
RESOURCE_EXHAUSTED: Allocation type: HLO temp; XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 17.60G of 15.75G hbm. Exceeded hbm capacity by 1.85G.

Total hbm usage >= 17.85G:
    reserved        258.00M

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(step)/jvp()/while/body/dot_general" stack_frame_id=3
     Shape: bf16[16,8,8192,2048]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.00G
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[128256,1024]{1,0:T(8,128)}
     Allocation type: HLO temp
     ==========================
"""


def test_the_error_of_a_program_too_large_names_its_buffers() -> None:
    found = memory.parse_out_of_memory(OUT_OF_MEMORY, arguments=GIB)
    assert found is not None
    assert (found.used, found.limit) == (17.6 * GIB, 15.75 * GIB)
    assert found.largest[0] == ("bf16[16,8,8192,2048] jit(step)/jvp()/while/body/dot_general", 4.0 * GIB)
    assert found.largest[1] == ("f32[128256,1024] HLO temp", 0.5 * GIB)
    assert memory.parse_out_of_memory("INTERNAL: something else", arguments=GIB) is None
    early = "Ran out of memory on HBM, the total memory required for HLO temporaries ({}) exceeds available HBM ({})."
    early = early.format("97.41G", "15.75G")
    assert memory.parse_out_of_memory(early, arguments=GIB) == (98.41 * GIB, 15.75 * GIB, [])


def test_the_largest_values_of_a_program_are_one_device_s_and_of_all_rounds() -> None:
    def step(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.sin(x), jnp.cos(x)), x, length=5)[1].sum()

    first, *_ = memory.largest_values(jax.make_jaxpr(step)(jnp.ones((3, 4))).jaxpr)
    assert first.bytes == 5 * 3 * 4 * 4 and first.name.startswith("f32[5,3,4] scan")


# Time and price -------------------------------------------------------------------------------------------------------


def test_prices(tiny: step.Plan) -> None:
    found = {name: chips.CHIPS[kind].dollars for name, kind in (("v5e", "TPU v5 lite"), ("v5p", "TPU v5"))}
    assert found == {"v5e": 1.20, "v5p": 4.20}
    plan = tiny._replace(chip=Chip(1e12, dollars=3.0))
    assert table.hours_and_dollars(plan, 3.6) == (1.0, 3.0)  # 1000 steps of 3.6 s
    assert table.hours_and_dollars(plan._replace(chip=None), 3.6) == (1.0, None)


def test_the_table_says_what_a_run_takes(tiny: step.Plan) -> None:
    """A chip that does the step's matmuls in 3.6 s, with instant memory and network: its MFU leaves causality out."""
    assert tiny.work is not None and tiny.compiled is not None
    chip = Chip(tiny.work.flops / 3.6, hbm_bandwidth=1e30, link=1e9, dollars=3.0)
    plan = tiny._replace(chip=chip, compiled=tiny.compiled._replace(network_seconds=0.0))
    (row,) = [line.split() for line in table.lines(plan) if "all overlapped" in line]
    share = f"{tiny.step_flops.causal / tiny.step_flops.full:.1%}"
    assert row == ["all", "overlapped", "3.6000", "s", f"{8 * 16 / 3.6:,.0f}", share, "1.00", "h", "1", "$3"]
    assert table.as_json(plan)["bounds"]["fastest"]["dollars"] == pytest.approx(3.0)
    idle = plan._replace(topology=topology.parse("cpu-3"))
    assert "2 of 3 devices have nothing to do" in "\n".join(table.lines(idle))


def test_one_device_executes_what_the_declaration_counts(tiny: step.Plan) -> None:
    """And, with the plain attention of a CPU, every query and key."""
    assert tiny.work is not None
    assert tiny.work.flops == tiny.step_flops.full
    again = plan_on_one_cpu(parse(TINY | {"model": {**TINY["model"], "remat": "full"}}))
    assert again.work is not None and tiny.work.flops < again.work.flops < 4 / 3 * tiny.work.flops
    found = roofline.Estimate(compute=2.0, memory=1.0, network=0.5)
    assert (found.fastest, found.slowest) == (2.0, 3.5)


def test_of_a_switch_the_costliest_branch_counts() -> None:
    """In a loop, of FLOPs, of bytes moved, and of what a backward pass finds saved."""

    def branch(rounds: int) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jax.lax.scan(lambda x, _: (x @ x, x), x, length=rounds)[0]

    def loop(x: jax.Array) -> jax.Array:
        branches = [branch(1), branch(3), lambda x: x]
        return jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.switch(i % 3, branches, x), x)

    program = jax.make_jaxpr(loop)(jnp.ones((4, 4))).jaxpr
    found = roofline.work(program, visible=1.0, state_bytes=0.0)
    assert found == (5 * 3 * 2 * 4**3, 5 * 3 * 3 * 4 * 4 * 4)
    assert memory.saved_for_backward(program) == 3 * 4 * 4 * 4


ROW, COLUMNS, ALL = slice(0, 16), slice(0, 128), slice(0, 256)


@pytest.mark.parametrize(
    ("name", "group", "seconds"),
    [
        ("v5e-256", ROW, 1 / (2 * 50)),  # a ring of 16 chips: two links
        ("v5e-256", slice(0, 8), 1 / 50),  # half of it is a line: one link
        ("v5e-256", slice(0, 2), 1 / 50),
        ("v5e-256", COLUMNS, 1 / (3 * 50)),  # 8 rows of 16: a line and a ring
        ("v5e-256", ALL, 1 / (4 * 50)),
        ("v5e-16", slice(0, 4), 1 / 50),  # nothing closes
        ("v5p-128", slice(0, 64), 1 / (6 * 100)),
    ],
)
def test_links_of_a_group(name: str, group: slice, seconds: float) -> None:
    """Seconds that a gigabyte, sent by the bandwidth-optimal ring, takes."""
    target = topology.parse(name)
    chip = chips.CHIPS["TPU v5" if target.family == "v5p" else "TPU v5 lite"]
    members = tuple(range(target.chips)[group])
    one = Collective("all-gather", 10**9 * len(members) // (len(members) - 1), members)
    assert roofline.network_seconds(chip, target, places(target), [one]) == pytest.approx(seconds, rel=1e-3)
    assert roofline.network_seconds(chip._replace(link=None), target, places(target), [one]) is None


def places(target: topology.Topology) -> list[roofline.Place]:
    """Row by row, slice by slice."""
    everywhere = itertools.product(range(target.slices), itertools.product(*map(range, target.shape)))
    return [roofline.Place(slice_, coords) for slice_, coords in everywhere]


def test_an_all_to_all_crowds_the_links() -> None:
    """Each of 16 chips sends a 16th of its array to each other: over 4 hops of a ring on average, of 32 links."""
    target, chip = topology.parse("v5e-256"), chips.CHIPS["TPU v5 lite"]
    one = Collective("all-to-all", 10**9, tuple(range(16)))
    hops = sum(min(away, 16 - away) for away in range(16))
    expected = 16 * hops * 10**9 / 16 / 32 / 50e9
    assert roofline.network_seconds(chip, target, places(target), [one]) == pytest.approx(expected)


def test_between_slices_each_device_sends_its_share() -> None:
    target, chip = topology.parse("2xv5e-16"), chips.CHIPS["TPU v5 lite"]
    seconds = functools.partial(roofline.network_seconds, chip, target, places(target))
    pair, everyone = (0, 16), tuple(range(32))
    assert seconds([Collective("all-reduce", 10**9, pair)]) == pytest.approx(1 / 3.125)
    inside = 2 * 15 / 16 / (2 * 50)  # two open dimensions
    assert seconds([Collective("all-reduce", 10**9, everyone)]) == pytest.approx(inside + 1 / 16 / 3.125)
    assert seconds([Collective("collective-permute", 10**9, pair)]) == pytest.approx(1 / 3.125)
    assert seconds([Collective("collective-permute", 10**9, (0, 1))]) == pytest.approx(1 / 50)


# Search ---------------------------------------------------------------------------------------------------------------


def test_search_ranks_what_fits(tiny: step.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the smaller step alone, that one is found; with less, nothing is compiled."""
    target, made = topology.parse("cpu-1"), []
    monkeypatch.setattr(search, "MICROBATCHES", (1, 4))
    monkeypatch.setattr(search, "REMAT", ("full",))

    def make_plan(cfg: Config, *arguments: Any) -> step.Plan:  # compiles each config once, whatever the chip
        plan = next((plan for plan in made if plan.cfg == cfg), None) or step.make_plan(cfg, *arguments)
        made.append(plan)
        return plan._replace(chip=chips.chip("cpu"))

    monkeypatch.setattr(search, "make_plan", make_plan)
    found = search.search(tiny.cfg, target, topology.devices(target), seconds=600)
    assert (found.candidates, len(found.plans), found.rejected, found.too_large) == (2, 2, 0, 0)
    least = [one.fixed_bytes + one.saved_bytes for one in search.candidates(tiny.cfg, target, topology.devices(target))]
    whole, pieces = sorted(found.plans, key=lambda plan: plan.cfg.train.microbatches)
    assert pieces.needed < whole.needed
    assert max(least) < pieces.needed, "a bound from below"

    monkeypatch.setattr(chips, "CHIPS", {"cpu": Chip(1e12, pieces.needed, 1e11, 1e9, None, 1.0)})
    found = search.search(tiny.cfg, target, topology.devices(target), seconds=600)
    assert (found.plans, found.rejected) == ([pieces._replace(chip=chips.chip("cpu"))], 1)
    assert "best: --config.train.microbatches=4 --config.model.remat=full" in table.search_text(found)
    assert table.search_as_json(found)["plans"][0]["microbatches"] == 4

    compiled = len(made)
    monkeypatch.setattr(chips, "CHIPS", {"cpu": Chip(1e12, min(least) - 1, 1e11, 1e9)})
    found = search.search(tiny.cfg, target, topology.devices(target), seconds=600)
    assert (found.plans, found.too_large) == ([], 2) and len(made) == compiled


@pytest.mark.parametrize("error", [ConfigError("only tracing tells"), jax.errors.JaxRuntimeError("INTERNAL: XLA's")])
def test_a_search_learns_from_what_does_not_fit(
    tiny: step.Plan, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Programs that save ten times what the form says: after 1 microbatch fails, 2 are not tried; 8 are refused."""
    target, made = topology.parse("cpu-1"), []
    chip = Chip(1e12, 0.0, 1e11, 1e9)
    monkeypatch.setattr(chips, "CHIPS", {"cpu": chip})
    monkeypatch.setattr(search, "REMAT", ("full",))
    whole, *_ = search.candidates(tiny.cfg, target, topology.devices(target))
    chip = chip._replace(hbm=whole.fixed_bytes + 4 * whole.saved_bytes)
    monkeypatch.setattr(chips, "CHIPS", {"cpu": chip})

    def make_plan(cfg: Config, *arguments: Any) -> step.Plan:
        made.append(cfg.train.microbatches)
        if cfg.train.microbatches == 8:
            raise error
        return tiny._replace(
            cfg=cfg, chip=chip, needed=whole.fixed_bytes + 10 * whole.saved_bytes / cfg.train.microbatches
        )

    monkeypatch.setattr(search, "make_plan", make_plan)
    found = search.search(tiny.cfg, target, topology.devices(target), seconds=600)
    assert made == [1, 4, 8]
    assert (len(found.plans), found.rejected, found.too_large, dict(found.refused)) == (1, 1, 1, {str(error): 1})
    text = table.search_text(found)
    assert f"2 compiled, of which 1 fit, 0 not reached in time\n  1 refused: {error}" in text
    assert table.search_as_json(found)["refused"] == {str(error): 1}


@pytest.mark.parametrize(("batch", "microbatches"), [(1, {1}), (4, {1, 2, 4}), (12, {1, 2, 4})])
def test_a_search_leaves_out_microbatches_that_do_not_divide_the_batch(batch: int, microbatches: set[int]) -> None:
    cfg = parse(TINY | {"train": {**TINY["train"], "batch": batch}})
    target = topology.parse("cpu-1")
    found = search.candidates(cfg, target, topology.devices(target))
    assert {one.cfg.train.microbatches for one in found} == microbatches


def test_every_layout_is_searched_once() -> None:
    every = list(search.meshes(16, MeshConfig()))
    assert {mesh.layout for _, mesh in every} == set(LAYOUTS)
    assert len({tuple(sizes.items()) for sizes, _ in every}) == len(every)
    assert all(math.prod(sizes.values()) == 16 for sizes, _ in every)
    assert all(axis_sizes(mesh, 16) == sizes for sizes, mesh in every)
    across = list(search.meshes(16, MeshConfig(slices=2)))
    assert across and all(sizes["slices"] == 2 and math.prod(sizes.values()) == 16 for sizes, _ in across)


@pytest.mark.parametrize("given", [{"tensor": 2}, {"data": 2, "tensor": 4}, {"fsdp": 16}, {"slices": 2}, {"expert": 1}])
def test_sizes_that_are_set_are_kept(given: dict[str, int]) -> None:
    def having(found: Iterable[tuple[dict[str, int], MeshConfig]]) -> list[dict[str, int]]:
        return [sizes for sizes, _ in found if sizes | given == sizes]

    kept = list(search.meshes(16, MeshConfig(**given)))
    assert kept and having(kept) == [sizes for sizes, _ in kept]
    assert all(math.prod(sizes.values()) == 16 and axis_sizes(mesh, 16) == sizes for sizes, mesh in kept)
    assert all(getattr(mesh, axis) == size for _, mesh in kept for axis, size in given.items()), "no flag takes it back"
    assert all(sizes in having(kept) for sizes in having(search.meshes(16, MeshConfig())))


def test_a_search_without_a_choice_says_so() -> None:
    target, cfg = topology.parse("cpu-1"), replace(parse(TINY), mesh=MeshConfig(tensor=3))
    with pytest.raises(
        ConfigError, match=r"no layout passes the config's checks on 1 device\(s\); change train.batch=8"
    ):
        search.search(cfg, target, topology.devices(target), seconds=0)


def test_the_command_says_what_to_do_when_nothing_fits() -> None:
    """On eight devices that need not exist. The config's own checks say which layouts are possible."""
    result = lmjax_plan("--topology=cpu-8", "--config.train.batch=16", "--search", "--minutes=0", "--json")
    assert result.returncode == 2 and "nothing that was tried fits" in result.stderr  # no time to compile anything
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["candidates"] > 20 and found["plans"] == []


# TPUs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"needs libtpu.*pip install 'lmjax\[tpu\]'"):
        topology.devices(topology.parse("v5e-8"))


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_program_gathers_each_weight_for_each_pass() -> None:
    """fsdp: layers forward and again backward, the tied table as lookup and as head, all in bfloat16; nothing else."""
    wide = ["--config.model.embed=2048", "--config.model.mlp=4096", "--config.data.seq_len=256", "--json"]
    result = lmjax_plan("--topology=v5e-8", *wide, "--config.model.context=256", "--config.mesh.layout=fsdp")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    sent, table_ = plan["collective_bytes"], TINY["model"]["vocab"] * 2048
    weights = 2 * (plan["parameters"] - table_) + 2 * table_
    assert sent["all-gather"] == pytest.approx(7 / 8 * 2 * weights, rel=0.02)
    assert sent["reduce-scatter"] > 50 * sent["all-reduce"]  # which is left for norms
    assert sent["all-to-all"] == sent["collective-permute"] == 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("v5e-8", MeshConfig(layout="fsdp")),
        ("v5e-16", MeshConfig(layout="dp+fsdp", fsdp=4)),
        ("v5e-16", MeshConfig(layout="fsdp+tp", tensor=4)),
        ("2xv5e-8", MeshConfig(layout="fsdp", slices=2)),
    ],
)
def test_a_tpu_program_scatters_gradients(name: str, mesh: MeshConfig) -> None:
    """Of weights that fsdp splits; copies and other slices add up the pieces alone. All-reduces are left for norms."""
    cfg = parse(TINY)
    model = replace(cfg.model, embed=2048, mlp=4096, context=256)
    cfg = replace(cfg, model=model, data=replace(cfg.data, seq_len=256), train=replace(cfg.train, batch=16), mesh=mesh)
    target = topology.parse(name)
    plan = step.make_plan(cfg, target, topology.devices(target))
    assert plan.compiled is not None
    whole: dict[tuple[str, ...], float] = Counter()
    for one in plan.compiled.collectives:
        if "reduce" in one.kind:
            whole[one.kind, *one.axes(plan.mesh)] += one.bytes * one.times
    scattered = whole["reduce-scatter", "fsdp"]
    assert scattered > 4 * (plan.counts.total + model.vocab * model.embed - 8 * model.embed) / plan.mesh["tensor"]
    pieces = sum(n for (kind, *axes), n in whole.items() if kind == "all-reduce" and {*axes} & {"slices", "data"})
    assert pieces <= 1.05 * scattered / plan.mesh["fsdp"]
    assert sum(n for (kind, *axes), n in whole.items() if kind == "all-reduce" and "fsdp" in axes) < scattered / 50


@needs_libtpu
@pytest.mark.slow
def test_a_billion_parameters_on_256_chips_take_two_cores_two_minutes() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lmjax", "plan", "--config=configs/llama.py:1b", "--topology=v5e-256", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 120
    plan = json.loads(result.stdout)
    assert plan["fits"] and plan["chips"] == 256
    fastest, slowest = (plan["bounds"][name]["mfu"] for name in ("fastest", "slowest"))
    assert 0 < slowest < fastest < 1
    assert plan["bounds"]["fastest"]["dollars"] > 0
