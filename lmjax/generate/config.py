"""How text is generated."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lmjax.errors import ConfigError
from lmjax.schema import Fraction, NonNegativeFloat, Seed, config_class

LEAST_TEMPERATURE = 1e-20
"""Logits divided by less may leave float32, and infinite ones tie."""
_LARGEST_PENALTY = 1e30


def _in_float32(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ConfigError(
            f"{temperature} is below {LEAST_TEMPERATURE}, where float32 ends; 0 takes the most probable token"
        )
    return temperature


Temperature = Annotated[float, Field(ge=0), AfterValidator(_in_float32)]


@config_class
class GenerateConfig:
    """Sampling by default; temperature=0 is greedy, beams > 1 is beam search."""

    tokens: Annotated[int, Field(gt=0, le=1 << 24)] = 200
    """Most new tokens per prompt; float32 tells no more positions apart."""
    stop_at_endoftext: bool = True
    """End a row's text where the model ends the document."""
    seed: Seed = 0
    weights: Literal["bfloat16", "int8"] | None = None
    """Multiply by matrices in fewer bits, and what they meet in as few; default: as the model does, which is exact."""
    rows: Annotated[int, Field(gt=0, le=1 << 16)] = 16
    """Texts written at once; when one ends, the next prompt takes its row. Beam search takes all prompts at once."""

    temperature: Temperature = 1.0
    """Divides the logits; 0 takes the most probable token, and none is drawn."""
    top_k: Annotated[int, Field(gt=0, lt=1 << 31)] | None = None
    """Draw from this many most probable tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest most probable tokens that together hold this probability."""
    min_p: Fraction = 0.0
    """Draw from tokens at least this times as probable as the most probable one."""
    repetition_penalty: Annotated[float, Field(ge=1e-10, le=1e10)] = 1.0
    """Above 1, tokens already in the prompt or the text become less probable."""

    beams: Annotated[int, Field(gt=0, le=1 << 16)] = 1
    """Hypotheses that beam search keeps per prompt."""
    length_penalty: NonNegativeFloat = 0.6
    """Exponent of the length that beam search divides log-probabilities by: 0 favours short texts."""

    def __post_init__(self) -> None:
        if self.beams == 1:
            return
        if self.temperature > 0:
            raise ConfigError(f"beam search (beams={self.beams}) does not sample; set temperature=0, or beams=1")
        for name, unused in {"top_k": None, "top_p": 1, "min_p": 0, "repetition_penalty": 1}.items():
            if getattr(self, name) != unused:
                raise ConfigError(f"beam search (beams={self.beams}) has no {name}; set {name}={unused}, or beams=1")
        if self.length_penalty * math.log((5 + self.tokens) / 6) > math.log(_LARGEST_PENALTY):
            raise ConfigError(
                f"length_penalty={self.length_penalty} divides texts of tokens={self.tokens} by more than "
                f"{_LARGEST_PENALTY}, and all scores are 0; set it to about 1"
            )
