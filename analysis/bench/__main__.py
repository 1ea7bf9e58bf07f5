"""`python -m analysis.bench`: `analysis.bench.speed`, by its short name."""

from lmjax.devices import flags
from lmjax.process import start_up

if __name__ == "__main__":
    start_up.tune_allocator()
    flags.set_flags()

from analysis.bench.speed import main

if __name__ == "__main__":
    main()
