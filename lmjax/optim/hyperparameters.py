"""Published rules for hyperparameters: from the size, tokens and shape of a run to learning rate, batch and the rest.

A rule is a value in RULES. Its constants come from its source, together with what the source calls N, the batch and the
compute, the optimizer that it was fitted with, and the range of the runs that it was fitted to; docs/hyperparameters.md
has the table. `read_law` makes a rule of the laws that `python -m analysis report` fits to one's own sweep.

Plain Python: configs are loaded, and sweeps planned, without JAX. A batch is counted in tokens.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lmjax.errors import ConfigError

LAW_FORMAT = 1


@dataclass(frozen=True)
class Scale:
    """How large a run is, as far as rules look at it."""

    tokens: float
    """D: all tokens trained on, repeated ones again."""
    width: int
    """Of the residual stream."""
    layers: int
    sequence: int
    """Tokens a row."""
    params: Mapping[str, float]
    """N by how it is counted (models/parameters.py); without a vocabulary only `layers`."""

    def count(self, name: str) -> float:
        """N by one way of counting. Raises ConfigError where that takes a vocabulary, and there is none."""
        if name not in self.params:
            raise ConfigError(f"N counted as '{name}' needs the vocabulary: set model.vocab")
        return self.params[name]


@dataclass(frozen=True)
class Advice:
    """What a rule says; None where it is silent."""

    learning_rate: float | None = None
    """The peak."""
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    """Decoupled, in units of the learning rate."""
    schedule: str | None = None
    """A name in SCHEDULES."""
    warmup: int | None = None
    """Updates."""
    final_fraction: float | None = None
    """Learning rate at the end over its peak."""
    decay_fraction: float | None = None
    """Part of all updates, at the end, in which the learning rate falls."""

    def settings(self) -> dict[str, Any]:
        """What it says, by the keys of a config."""
        said = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None}
        return {f"optimizer.{_KEYS.get(name, name)}": value for name, value in said.items()}


_KEYS = {
    "schedule": "schedule.name",
    "warmup": "schedule.warmup",
    "final_fraction": "schedule.final_fraction",
    "decay_fraction": "schedule.decay_fraction",
}

Range = tuple[float, float]


@dataclass(frozen=True)
class Rule:
    """Functions of a run's scale, with what makes them comparable."""

    source: str
    advise: Callable[[Scale, float], Advice]
    """(scale, batch in tokens) -> all but the batch."""
    batch: Callable[[Scale], float] | None = None
    """scale -> batch in tokens; None where the rule takes it as given."""
    optimizer: str | None = "adamw"
    """What it was fitted with, a name in OPTIMIZERS; None where that is not known."""
    fitted: Mapping[str, Range] = field(default_factory=dict)
    """Smallest and largest of each quantity (a key of QUANTITIES) in the runs behind it."""

    def warnings(self, scale: Scale, batch: float) -> list[str]:
        """One line for each quantity of the run that lies outside the range of the runs behind the rule."""
        found = []
        for name, (low, high) in self.fitted.items():
            value = QUANTITIES[name](self, scale, batch)
            if not low <= value <= high:
                found.append(f"{name} = {value:.3g} is outside {low:.3g} to {high:.3g}, where the rule was fitted")
        return found


def updates(tokens: float, batch: float) -> int:
    """How many updates of `batch` tokens come nearest to `tokens`; at least one."""
    return max(1, round(tokens / batch))


def rows(batch: float, sequence: int, multiple: int = 1) -> int:
    """The batch in sequences: `multiple` times the power of two that comes nearest in ratio to `batch` tokens."""
    return multiple * 2 ** max(0, round(math.log2(batch / (sequence * multiple))))


# DeepSeek LLM (Bi et al. 2024, arXiv:2401.02954) --------------------------------------------------------------------


def deepseek_flops(scale: Scale) -> float:
    """C = M D. M, FLOPs a token, has attention and no vocabulary: 6 N + 12 L d T (equation 2, where 6 N = 72 L d^2)."""
    per_token = 6.0 * scale.count("layers") + 12.0 * scale.layers * scale.width * scale.sequence
    return per_token * scale.tokens


def deepseek(scale: Scale, batch: float) -> Advice:
    """Equation 1; betas, decay and the 2000 updates of warmup are those of section 2.3.

    Its schedule falls in two steps to a tenth of the peak; a cosine gave the same loss.
    """
    del batch
    rate = 0.3118 * deepseek_flops(scale) ** -0.125
    return Advice(learning_rate=rate, b1=0.9, b2=0.95, weight_decay=0.1, warmup=2000, final_fraction=0.1)


# Step Law (Li et al. 2025, arXiv:2503.04715) ------------------------------------------------------------------------


def step_law(scale: Scale, batch: float) -> Advice:
    """Equation 1 with the coefficients of table 2, for a cosine that ends at a rate of 1e-5 whatever the peak."""
    del batch
    rate = 1.79 * scale.count("layers") ** -0.713 * scale.tokens**0.307
    return Advice(learning_rate=rate, schedule="cosine", warmup=2000, final_fraction=min(1.0, 1e-5 / rate))


# Marin (lib/marin/src/marin/scaling_laws/recipe.py, MARIN_2025_RECIPE) ----------------------------------------------

MARIN_SEQUENCE = 4096  # tokens; the recipe counts a batch in sequences of this length


def marin(scale: Scale, batch: float) -> Advice:
    """Rate 0.33 sqrt(B) / d and b2 0.98^(B / 128), B in sequences of 4096 tokens; warmup 10%, decay 20% to zero."""
    sequences = batch / MARIN_SEQUENCE
    return Advice(
        learning_rate=0.33 * math.sqrt(sequences) / scale.width,
        b1=0.95,
        b2=0.98 ** (sequences / 128.0),
        eps=1e-15,
        weight_decay=0.1,
        schedule="wsd",
        warmup=round(0.1 * updates(scale.tokens, batch)),
        final_fraction=0.0,
        decay_fraction=0.2,
    )


# Porian et al. 2024 (arXiv:2406.19146), and OLMo's ladder after them (Bhagia et al. 2024, arXiv:2412.04403) ----------

PORIAN_PARAMS = 108e6


def porian_rate(params: float) -> float:
    """0.0047 (N / 108M)^(-1/3); N has the output head and no embedding."""
    return 0.0047 * (params / PORIAN_PARAMS) ** (-1 / 3)


def porian_batch(params: float) -> float:
    """160 (N / 108M)^(2/3) sequences of 2048 tokens, in tokens."""
    return 160 * 2048 * (params / PORIAN_PARAMS) ** (2 / 3)


def porian(scale: Scale, batch: float) -> Advice:
    """The tuned runs: a warmup of N tokens, then a constant rate."""
    params = scale.count("matmul")
    return Advice(learning_rate=porian_rate(params), schedule="constant", warmup=max(1, round(params / batch)))


def olmo_ladder(scale: Scale, batch: float) -> Advice:
    """Porian et al.'s batch and warmup, their rate (a quarter of it beyond 2048 tokens a row), a cosine to a tenth."""
    params = scale.count("matmul")
    return Advice(
        learning_rate=porian_rate(params) / (1 if scale.sequence <= 2048 else 4),
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        schedule="cosine",
        warmup=max(1, round(params / batch)),
        final_fraction=0.1,
    )


# nanochat (scripts/base_train.py) -----------------------------------------------------------------------------------

NANOCHAT_BATCH = 2.0**19  # tokens, tuned at 12 layers of width 768
NANOCHAT_TOKENS = 12 * (84_935_088 + 25_165_824)  # 12 for each of that model's matrices in layers and head


def nanochat_batch(scale: Scale) -> float:
    """2^19 (D / D_ref)^0.383 tokens; the exponent is that of Bergsma et al. 2025 (arXiv:2505.13738)."""
    return NANOCHAT_BATCH * (scale.tokens / NANOCHAT_TOKENS) ** 0.383


def nanochat(scale: Scale, batch: float) -> Advice:
    """Muon at a rate as sqrt(B), with a decay that keeps AdamW's timescale B / (rate decay D) (arXiv:2405.13698).

    Its steps are U V' times sqrt(max(1, out / in)), ours 0.2 sqrt(max(out, in)) U V' (optim/muon.py): in our units its
    0.02 is 0.02 / (0.2 sqrt(d)), but for matrices that narrow, which it trains at half of that. Its decay of 0.28 falls
    to zero by half a cosine: ours is constant, so the mean, 0.14. rate x decay is the same in both units.
    """
    larger, unit = math.sqrt(batch / NANOCHAT_BATCH), 0.2 * math.sqrt(scale.width)
    return Advice(
        learning_rate=0.02 * larger / unit,
        eps=1e-10,
        weight_decay=0.14 * larger * NANOCHAT_TOKENS / scale.tokens * unit,
        schedule="wsd",
        warmup=40,
        final_fraction=0.05,
        decay_fraction=0.65,
    )


# The registry -------------------------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {
    "deepseek": Rule(
        source="DeepSeek LLM, arXiv:2401.02954, equations 1 and 2",
        batch=lambda scale: 0.2920 * deepseek_flops(scale) ** 0.3271,
        advise=deepseek,
        fitted={"C (DeepSeek's)": (1e17, 2e19)},
    ),
    "marin": Rule(
        source="Marin, MARIN_2025_RECIPE",
        advise=marin,
        fitted={"width": (512, 4096), "learning rate": (0.0, 0.01)},
    ),
    "nanochat": Rule(
        source="nanochat, scripts/base_train.py",
        batch=nanochat_batch,
        advise=nanochat,
        optimizer="muon",
        fitted={"width": (640, 1280)},
    ),
    "olmo_ladder": Rule(
        source="OLMo ladder, arXiv:2412.04403, src/ladder/ladder.py",
        batch=lambda scale: porian_batch(scale.count("matmul")),
        advise=olmo_ladder,
        fitted={"N (matmul)": (1.9e8, 1.28e9), "tokens a row": (2048, 4096)},
    ),
    "porian": Rule(
        source="Porian et al., arXiv:2406.19146, the released values of its tuned runs",
        batch=lambda scale: porian_batch(scale.count("matmul")),
        advise=porian,
        fitted={"N (matmul)": (5.1e6, 9.1e8), "tokens a row": (2048, 2048)},
    ),
    "step_law": Rule(
        source="Step Law, arXiv:2503.04715, equation 1",
        batch=lambda scale: 0.58 * scale.tokens**0.571,
        advise=step_law,
        fitted={"N (layers)": (5.9e7, 1.08e9), "D": (2e9, 1e11)},
    ),
}

COUNTS = ("active", "layers", "matmul", "non_embedding", "total")


def _counted(name: str) -> Callable[[Rule, Scale, float], float]:
    return lambda rule, scale, batch: scale.count(name)


QUANTITIES: dict[str, Callable[[Rule, Scale, float], float]] = {
    "C (DeepSeek's)": lambda rule, scale, batch: deepseek_flops(scale),
    "D": lambda rule, scale, batch: scale.tokens,
    **{f"N ({name})": _counted(name) for name in COUNTS},
    "learning rate": lambda rule, scale, batch: rule.advise(scale, batch).learning_rate or 0.0,
    "tokens a row": lambda rule, scale, batch: scale.sequence,
    "width": lambda rule, scale, batch: scale.width,
}


# One's own laws -----------------------------------------------------------------------------------------------------


def is_law(name: str) -> bool:
    """Whether a rule's name is the path of a file of laws."""
    return name.endswith(".json")


def find_rule(name: str) -> Rule:
    """The rule of a name in RULES, or of a file `*.json` of laws. Raises ConfigError for any other."""
    if is_law(name):
        return read_law(name)
    if name not in RULES:
        close = difflib.get_close_matches(name, RULES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(RULES)}, or a law.json"
        raise ConfigError(f"there is no rule '{name[:80]}' ({hint})")
    return RULES[name]


@dataclass(frozen=True)
class PowerLaw:
    """exp(log_coefficient) N^params_exponent D^tokens_exponent."""

    log_coefficient: float
    params_exponent: float
    tokens_exponent: float

    def __call__(self, params: float, tokens: float) -> float:
        return math.exp(
            self.log_coefficient + self.params_exponent * math.log(params) + self.tokens_exponent * math.log(tokens)
        )


def read_law(path: str) -> Rule:
    """The rule in a `law.json` that `python -m analysis report` wrote.

    Raises ConfigError for a file that cannot be read, that has no law, or whose N only its own table knows.
    """
    try:
        stored = json.loads(Path(path).read_text())
        version, counted = stored["format"], stored["params"]
        laws = {
            name: PowerLaw(*(float(law[one.name]) for one in fields(PowerLaw)))
            for name, law in stored["laws"].items()
            if name in ("learning_rate", "batch_tokens")
        }
        reach = [tuple(map(float, stored[axis])) for axis in ("params_range", "tokens_range")] if laws else []
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a law.json of `analysis report`") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path}: is no law.json of `python -m analysis report`; write the report again") from None
    if version != LAW_FORMAT:
        raise ConfigError(f"{path}: has format {version!r}, this lmjax reads {LAW_FORMAT}; write the report again")
    if not laws:
        raise ConfigError(f"{path}: has no law: the sweep behind it tried too few learning rates and batches")
    if counted not in COUNTS:
        raise ConfigError(
            f"{path}: counts N as '{counted}', which is no count of a config; write the report with --params=total"
        )
    return _own_rule(path, counted, laws, {f"N ({counted})": reach[0], "D": reach[1]})


def _own_rule(path: str, counted: str, laws: Mapping[str, PowerLaw], fitted: Mapping[str, Any]) -> Rule:
    def at(name: str, scale: Scale) -> float:
        return laws[name](scale.count(counted), scale.tokens)

    return Rule(
        source=path,
        advise=lambda scale, batch: Advice(at("learning_rate", scale)) if "learning_rate" in laws else Advice(),
        batch=(lambda scale: at("batch_tokens", scale)) if "batch_tokens" in laws else None,
        optimizer=None,
        fitted=fitted,
    )
