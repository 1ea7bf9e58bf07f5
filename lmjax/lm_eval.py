"""EleutherAI's own command line with one model more: `python -m lmjax.lm_eval --model lmjax --model_args
workdir=runs/mine --tasks ...`.

The harness finds models in its registry alone and looks for no plugins, so ours is put there before its command begins.
All other arguments, what is printed and what is written are the harness's.
"""

import importlib.util
import os

from lmjax.errors import ConfigError
from lmjax.process import ending, start_up


def main() -> None:
    """The harness's command. Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("python -m lmjax.lm_eval needs EleutherAI's harness: install lmjax[eval]")
    os.environ["DISABLE_MULTIPROC"] = "1"  # read when the harness is imported: JAX's threads would not survive a fork
    start_up.configure_jax()
    from lm_eval import models  # which registers the harness's own, but only where there are none yet
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    assert "lmjax" not in models.MODEL_MAPPING
    model_registry.register("lmjax", target="lmjax.run.lm_eval_model:WorkDirectory")
    cli_evaluate()


if __name__ == "__main__":
    ending.run_main(main, debug=False)
