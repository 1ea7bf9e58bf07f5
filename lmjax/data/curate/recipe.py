"""A recipe: where documents come from, and the steps that they go through, by name, in order."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from lmjax.data.curate.clean import Extract, Normalize, Repair
from lmjax.data.curate.code_rules import Code, Licence
from lmjax.data.curate.decontaminate import Decontaminate
from lmjax.data.curate.duplicates import ExactDuplicates, RepeatedParts
from lmjax.data.curate.held_out import HeldOut
from lmjax.data.curate.language import Language
from lmjax.data.curate.names import Names
from lmjax.data.curate.near_duplicates import NearDuplicates
from lmjax.data.curate.privacy import Blocklist, Privacy
from lmjax.data.curate.quality import Quality
from lmjax.data.curate.quality_rules import Gopher, Repetition
from lmjax.data.curate.step import CorpusStep, DocumentStep
from lmjax.data.curate.toxicity import Toxicity
from lmjax.data.curate.web_rules import C4, FineWeb
from lmjax.errors import ConfigError
from lmjax.schema import PositiveInt, config_class, validated

STEPS: dict[str, type[DocumentStep] | type[CorpusStep]] = {
    "extract": Extract,
    "repair": Repair,
    "normalize": Normalize,
    "language": Language,
    "gopher": Gopher,
    "repetition": Repetition,
    "c4": C4,
    "fineweb": FineWeb,
    "code": Code,
    "licence": Licence,
    "privacy": Privacy,
    "names": Names,
    "blocklist": Blocklist,
    "held_out": HeldOut,
    "exact_duplicates": ExactDuplicates,
    "near_duplicates": NearDuplicates,
    "repeated_parts": RepeatedParts,
    "quality": Quality,
    "toxicity": Toxicity,
    "decontaminate": Decontaminate,
}

Step = DocumentStep | CorpusStep


@config_class
class CurateConfig:
    """What to curate, and how. All but `workers` and `document_bytes` fixes the result."""

    sources: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], tuple[str, ...]]
    """By name, files by glob or folders: what `prepare.inputs` takes, and .html, .htm, .warc,
    .warc.gz."""
    steps: tuple[dict[str, Any], ...]
    """In order: each one's name under `step`, and its settings."""
    text_key: str = "text"
    """The field of a JSON line, or the column of a Parquet file, that holds the text."""
    text_suffixes: tuple[Annotated[str, Field(pattern=r"^\.\w+$")], ...] = ()
    """Further ends of file names that are read as text, such as .c or .rs."""
    document_separator: str | None = None
    """Splits a .txt file into documents; by default a file is one document."""
    document_bytes: PositiveInt = 1 << 27
    """The longest document, or line of JSON, that is read; a longer one stops it."""
    invalid_utf8: Literal["error", "replace", "skip"] = "replace"
    """Stop, put U+FFFD in place of what cannot be decoded, or leave the document out."""
    chunk_bytes: PositiveInt = 1 << 23
    """Documents are worked on in chunks of so much text: memory is a few times that for each process."""
    shard_bytes: PositiveInt = 1 << 28
    """Text in a file of the result."""
    tokenizer: str | None = None
    """A tokenizer, by its folder or file: after each step, tokens are counted, too, which takes as long as encoding all
    that it was given or has changed."""
    workers: PositiveInt | None = None
    """Processes; by default one per CPU. The result does not depend on it."""

    def __post_init__(self) -> None:
        if not self.sources or not all(self.sources.values()):
            raise ConfigError("sources is empty: name at least one, with files, as in {'books': ('books/*.jsonl',)}")
        passed = ""
        for name, step in self.parsed():
            if passed and isinstance(step, HeldOut):
                raise ConfigError(f"steps: held_out comes before {passed}, which looks at all documents; move it up")
            passed = passed or (name if isinstance(step, CorpusStep) else "")

    def parsed(self) -> list[tuple[str, Step]]:
        """The steps with their names. Raises ConfigError for one that does not exist, or settings that do not fit."""
        return parse_steps(self.steps)


def parse_steps(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, Step]]:
    """As `CurateConfig.parsed`, of some of the steps."""
    return [parse_step(place, values) for place, values in enumerate(steps)]


def parse_step(place: int, values: Mapping[str, Any]) -> tuple[str, Step]:
    """(name, the step) of `{"step": name, ...}`, number `place` of the recipe."""
    settings = dict(values)
    name = settings.pop("step", None)
    if name not in STEPS:
        raise ConfigError(f"steps[{place}]: there is no step {name!r}; choose one of {', '.join(STEPS)}")
    return name, validated(STEPS[name], settings, f"steps[{place}] {name}.")


def choices(cfg: CurateConfig) -> dict[str, Any]:
    """All that fixes the result, with the defaults spelled out, as JSON."""
    values = dataclasses.asdict(cfg)
    del values["workers"], values["document_bytes"]
    values["steps"] = [{"step": name, **dataclasses.asdict(step)} for name, step in cfg.parsed()]
    return json.loads(json.dumps(values))
