"""How long, how often and how much: the settings of a training run."""

from typing import Annotated

from pydantic import AfterValidator, Field

from lmjax.errors import ConfigError
from lmjax.generate.config import Temperature
from lmjax.models.config import ModelConfig
from lmjax.names import names_in
from lmjax.schema import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Size,
    chosen,
    config_class,
    one_of,
)


@config_class
class LossConfig:
    """What next-token prediction minimizes."""

    name: Annotated[str, one_of(names_in("lmjax.losses", "TOKEN_LOSSES"))] = "cross_entropy"
    chunk: PositiveInt = 256
    """Positions per row whose logits exist at a time."""
    z_weight: NonNegativeFloat = 0.0
    """Weight of logsumexp(logits)^2, which keeps logits from drifting (PaLM used 1e-4)."""


@config_class
class DistillConfig:
    """What `task=distill` learns from a teacher."""

    teacher: str = ""
    """What to learn from: a run, `WORKDIR` or `WORKDIR@STEP`, or the directory of a Hugging Face checkpoint, with the
    tokenizer of the data."""
    stored: str | None = None
    """In place of a teacher: a directory in which `lmjax teach` has written what one said of these samples."""
    divergence: Annotated[str, one_of(names_in("lmjax.losses", "DIVERGENCES"))] = "forward_kl"
    """How far the student is from the teacher, token by token."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of both; the loss is multiplied by its square."""
    share: Fraction = 1.0
    """Of the loss; the rest is that of the labels."""
    model: ModelConfig | None = None
    """The teacher's; it is filled in."""


@config_class
class SampleConfig:
    """Text generated during training, to look at."""

    every: PositiveInt | None = None
    """Steps between samples; one is always made at the end."""
    prompts: tuple[str, ...] = ("",)
    """What the texts begin with. One device holds the whole model to write them: with none it need not."""
    tokens: Annotated[int, Field(gt=0, le=1 << 24)] = 128
    """How many to write at most; beyond a learned table of positions the text goes on from the table's newest half."""
    temperature: Annotated[Temperature, Field(gt=0)] = 0.8


_BENCHMARKS, _KINDS = (names_in("lmjax.evaluate.tasks.registry", registry) for registry in ("BENCHMARKS", "OWN"))


def _benchmark(name: str) -> str:
    """A benchmark's name, or KIND:FILE."""
    kind, colon, file = name.partition(":")
    if not colon:
        return chosen(name, _BENCHMARKS)
    if not file:
        raise ValueError(f"'{name}' names no file; write {kind}:FILE")
    return f"{chosen(kind, _KINDS)}:{file}"


@config_class
class EvaluationsConfig:
    """Benchmarks (docs/evaluation.md)."""

    tasks: Annotated[tuple[Annotated[str, AfterValidator(_benchmark)], ...], Field(min_length=1)] = (
        "lambada",
        "hellaswag",
    )
    """Their names, or KIND:FILE for a file of one's own, as `pairs:mine.jsonl`."""
    every: PositiveInt | None = None
    """Steps between them, a multiple of `train.evaluate_every`; None means at each evaluation. They are always answered
    at the end."""
    data: str = "data/eval"
    """The directory of their files."""
    limit: PositiveInt | None = 200
    """Most questions of each, the same ones every time, chosen by their hashes; None asks all."""
    shots: NonNegativeInt | None = None
    """Examples before each question; None means each benchmark's own number."""
    seed: Seed = 1234
    """Of examples that are drawn, and of what is sampled."""
    tokens: Size = 64
    """Of `prompts:FILE`: how many a model writes at most after each."""
    temperature: Temperature = 0.0
    """Of `prompts:FILE`: 0 takes the most probable token."""
    toxicity: str | None = None
    """Of `prompts:FILE`: a file of `lmjax classifier`, by which what is written is toxic or not."""


@config_class
class AdapterConfig:
    """Small weights that are trained beside frozen ones."""

    name: Annotated[str, one_of(names_in("lmjax.finetune.adapters", "ADAPTERS"))] = "lora"
    targets: tuple[str, ...] = ("segments/*",)
    """The weights beside which they stand, by patterns as in `tune.train`, of those that can have one; by default every
    matrix of every layer. A prompt has its own place."""
    rank: Size = 8
    """lora, dora: of the matrices beside. bottleneck: its width."""
    alpha: PositiveFloat = 16.0
    """lora, dora: what is beside counts alpha / rank times."""
    rank_stabilized: bool = False
    """lora, dora: alpha / sqrt(rank) times, so that a larger rank learns as fast (rsLoRA)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """lora, dora: on what the adapters of matrices in layers read."""
    length: Size = 20
    """prompt, prefix: places in front of every text."""


@config_class
class TuneConfig:
    """What of the weights is trained. The others are frozen: they are in neither optimizer state nor checkpoints, which
    name what they stand on by its hash (docs/tuning.md)."""

    train: tuple[str, ...] | None = None
    """The weights that are trained themselves, by patterns over their paths, ('unembed', 'mlp/*'), or over their axes,
    ('* -> vocab',). None means all of them, and with an adapter none."""
    freeze: tuple[str, ...] = ()
    """Of these, the weights that are not trained after all."""
    last_layers: PositiveInt | None = None
    """Of the layers only so many last ones are trained, and without `train` nothing else."""
    fresh: tuple[str, ...] = ()
    """The weights that are drawn anew, not taken from `train.init_from`, which may have them in other sizes or not at
    all: ('unembed',) for a new head, ('* -> vocab', 'vocab -> *') for another tokenizer."""
    store: Annotated[str, one_of(names_in("lmjax.finetune.storage", "STORAGES"))] = "float32"
    """How frozen matrices and tables are held."""
    adapter: AdapterConfig | None = None


@config_class
class TrainConfig:
    steps: PositiveInt = 1000
    tokens: PositiveInt | None = None
    """What to train on, in place of `steps`: these are then as many updates as come nearest."""
    batch: Size = 16
    """Sequences per update, over all devices."""
    microbatches: PositiveInt = 1
    """Pieces the batch is cut into, to save memory or to fill a pipeline (then a multiple of its stages); the result is
    the same."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of initial weights and dropout."""
    init_from: str | None = None
    """What this run's weights start from: another run, `WORKDIR` or `WORKDIR@STEP`, or the directory of a Hugging Face
    checkpoint of this model; all else starts anew."""
    branch_from: str | None = None
    """A run whose first steps are this one's, too, `WORKDIR@STEP`: same settings but for steps and schedule, which give
    the same learning rates up to there (docs/branches.md)."""
    loss: LossConfig = LossConfig()
    distill: DistillConfig | None = None
    """Of `task=distill`: what it learns from a teacher."""
    log_every: PositiveInt = 10
    noise_scale: bool = False
    """Log the gradient noise scale's two parts, which takes at least 2 microbatches (docs/hyperparameters.md)."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Keep a moving average of the weights, too: each update multiplies by this what earlier ones count in it. It is
    what is evaluated, generated from and exported (docs/branches.md). 0 keeps none."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations; one is always made at the end."""
    evaluate_batches: PositiveInt | None = None
    """Batches per evaluation, always the same, drawn from the whole set (`val/`); at the end all of it is scored, too
    (`val_full/`)."""
    evaluate_batch: Size | None = None
    """Sequences per evaluation batch; None means `batch`."""
    evaluations: EvaluationsConfig | None = None
    """Benchmarks that are answered where the run evaluates, too (`eval/`)."""
    sample: SampleConfig = SampleConfig()
    max_skipped_in_a_row: PositiveInt = 10
    """Updates that may be left out one after another before the run stops."""
    skip_spikes: PositiveFloat | None = None
    """Leave out an update whose loss or gradient norm is more than so many standard deviations above the mean of the
    last 128 steps (6 is usual), once there were 64; None leaves none out."""
    check_replicas: PositiveInt | None = None
    """Steps between comparisons of the copies that devices keep of the same arrays, which must be equal to the bit;
    they are compared before each save, too. One that differs ends the run and is named (exit code 5)."""
    step_timeout: PositiveFloat = 1800.0
    """Seconds without progress after which the run gives up (exit code 6)."""
    compression_baseline: bool = False
    """At the end, compress the validation text with xz for comparison."""

    def __post_init__(self) -> None:
        every = None if self.evaluations is None else self.evaluations.every
        if every is not None and (self.evaluate_every is None or every % self.evaluate_every):
            raise ConfigError(
                f"evaluations.every={every} is no multiple of evaluate_every={self.evaluate_every}, and benchmarks are "
                "answered where the run evaluates; set both"
            )
