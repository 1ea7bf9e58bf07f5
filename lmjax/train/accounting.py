"""What training costs, counted on the host in whole numbers."""

from typing import NamedTuple


class Cost(NamedTuple):
    """What training has cost, or costs per sequence, in exact Python integers: they never round or overflow."""

    samples: int
    tokens: int
    flops_6nd: int
    flops_causal: int
    flops_full: int

    def plus(self, times: int, other: "Cost") -> "Cost":
        return Cost(*(here + times * there for here, there in zip(self, other, strict=True)))


class Accounting(NamedTuple):
    """What training costs, counted on from where this attempt starts: what lies before may have cost something else."""

    start: int
    """The step that this attempt starts from."""
    before: Cost
    """All that the steps up to there cost."""
    batch: int
    per_sequence: Cost
    peak_flops: float | None
    """Of all devices together; None where unknown, and then there is no MFU."""

    def counts(self, step: int) -> Cost:
        """Of the first `step` steps; their samples are the index of the next one."""
        return self.before.plus((step - self.start) * self.batch, self.per_sequence)

    def totals(self, step: int) -> dict[str, int]:
        """As every line of metrics has them."""
        counts = self.counts(step)
        return {"tokens": counts.tokens, "flops": counts.flops_causal}

    def rates(self, steps: int, seconds: float) -> dict[str, float]:
        """Throughput; MFU counts causal attention (a query against the keys it may see) and no recomputation."""
        sequences_per_second = steps * self.batch / seconds
        flops_per_second = sequences_per_second * self.per_sequence.flops_causal
        rates = {
            "perf/step_time": seconds / steps,
            "perf/tokens_per_sec": sequences_per_second * self.per_sequence.tokens,
            "perf/flops_per_sec": flops_per_second,
        }
        return rates if self.peak_flops is None else {**rates, "perf/mfu": flops_per_second / self.peak_flops}
