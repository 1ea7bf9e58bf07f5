import os
import subprocess
import sys

import pytest

from lmjax.devices.flags import GPU_FLAGS, set_flags


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")


def set_in(**environ: str) -> dict[str, str]:
    set_flags(environ)
    return environ


def test_what_the_user_says_stays_and_comes_first() -> None:
    found = set_in(XLA_FLAGS="--xla_gpu_deterministic_ops=false --xla_dump_to=/x")["XLA_FLAGS"].split()
    assert found[:2] == ["--xla_gpu_deterministic_ops=false", "--xla_dump_to=/x"]
    assert sorted(flag.lstrip("-").split("=")[0] for flag in found[1:]) == sorted(
        ["xla_dump_to", *(GPU_FLAGS.keys() - {"xla_gpu_deterministic_ops"})]
    )


def test_setting_them_again_changes_nothing() -> None:
    once = set_in()
    assert set_in(**once) == once


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_they_are_for_gpus_alone(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    assert set_in() == {}


def test_one_variable_switches_them_off() -> None:
    assert set_in(LMJAX_XLA_FLAGS="off").keys() == {"LMJAX_XLA_FLAGS"}


def compiled_with(flags: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)


def test_the_installed_xla_knows_every_one() -> None:
    """It would end the process otherwise, on a CPU as on a GPU."""
    assert compiled_with(set_in()["XLA_FLAGS"]).stdout == "2\n"
    unknown = compiled_with("--xla_gpu_no_such_flag=true")
    assert unknown.returncode and "Unknown flag" in unknown.stderr
