"""XLA's flags for GPUs: the one table, and how a process takes them.

XLA reads them once, when JAX looks for devices, and ends a process over a name that it does not know: a test holds the
names to the installed jaxlib. None of them lets the bits of a run depend on when it was started.

TPUs have no table. What public recipes set there (asynchronous collectives in the background of products, gradients of
copies added up as they are ready) libtpu does by itself: docs/performance.md.
"""

import os
from collections.abc import MutableMapping

from lmjax.process import start_up

SWITCH = "LMJAX_XLA_FLAGS"  # =off: none of them is set

GPU_FLAGS = {
    # A kernel adds up in one order, and is chosen by rule, not by a measurement, which at the next start may choose
    # another: a resumed run then has the bits of one that was not (README, P1). cuDNN's attention and scatters are
    # slower for it.
    "xla_gpu_deterministic_ops": "true",
    # Products go to cuBLAS, which chooses by rule as well; Triton's kernels are good ones only where they are measured.
    "xla_gpu_enable_triton_gemm": "false",
    # Computing goes on while devices send: weights are gathered, and gradients added up, before they are needed.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # The same across the turns of a scan over layers, and without copies between two turns.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    "xla_gpu_enable_while_loop_double_buffering": "true",
    # Command buffers, which launch many kernels at once, XLA uses without being told.
}


def set_flags(environ: MutableMapping[str, str] = os.environ) -> None:
    """Add the flags to XLA_FLAGS where a GPU is; call it before JAX looks for devices.

    What XLA_FLAGS says already stays: a flag that it names is not added.
    """
    if start_up.accelerator() != "gpu" or environ.get(SWITCH) == "off":
        return
    given = environ.get("XLA_FLAGS", "").split()
    named = {flag.lstrip("-").partition("=")[0] for flag in given}
    ours = [f"--{name}={value}" for name, value in GPU_FLAGS.items() if name not in named]
    environ["XLA_FLAGS"] = " ".join([*given, *ours])
