"""What training costs, counted on the host in whole numbers."""

from typing import NamedTuple


class Cost(NamedTuple):
    """What training has cost, or what one sample costs, in exact Python integers: they never round or overflow."""

    samples: int
    tokens: int
    flops_6nd: int
    flops_causal: int
    flops_full: int

    def plus(self, times: int, other: "Cost") -> "Cost":
        return Cost(*(here + times * there for here, there in zip(self, other, strict=True)))


class Accounting(NamedTuple):
    """What training costs, counted on from where this attempt starts: what lies before may have cost something else."""

    start_step: int
    """The step that this attempt starts from."""
    before: Cost
    """All that the steps up to there cost."""
    batch: int
    """Samples per step."""
    per_sample: Cost
    peak_flops: float | None
    """What all devices together can do; None where that is unknown, and then there is no MFU."""

    def spent(self, step: int) -> Cost:
        """What the first `step` steps cost. Its `samples` are the index of the sample that comes next."""
        return self.before.plus((step - self.start_step) * self.batch, self.per_sample)

    def totals(self, step: int) -> dict[str, int]:
        """The two numbers of the cost that every line of metrics has."""
        spent = self.spent(step)
        return {"tokens": spent.tokens, "flops": spent.flops_causal}

    def rates(self, steps: int, seconds: float) -> dict[str, float]:
        """Throughput; MFU counts causal attention (a query against the keys it may see) and no recomputation."""
        samples_per_second = steps * self.batch / seconds
        flops_per_second = samples_per_second * self.per_sample.flops_causal
        rates = {
            "perf/step_time": seconds / steps,
            "perf/tokens_per_sec": samples_per_second * self.per_sample.tokens,
            "perf/flops_per_sec": flops_per_second,
        }
        return rates if self.peak_flops is None else {**rates, "perf/mfu": flops_per_second / self.peak_flops}
