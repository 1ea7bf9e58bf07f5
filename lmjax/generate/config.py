"""How text is generated."""

from typing import Annotated

from pydantic import Field

from lmjax.errors import ConfigError
from lmjax.schema import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, config_class


@config_class
class GenerateConfig:
    """Sampling by default; temperature=0 is greedy, beams > 1 is beam search."""

    tokens: PositiveInt = 200
    """Most new tokens per prompt."""
    stop_at_endoftext: bool = True
    """End a row's text where the model ends the document."""
    seed: NonNegativeInt = 0

    temperature: NonNegativeFloat = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: PositiveInt | None = None
    """Draw from this many most probable tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest most probable tokens that together hold this probability."""
    min_p: Fraction = 0.0
    """Draw from tokens at least this times as probable as the most probable one."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1, tokens already in the prompt or the text become less probable."""

    beams: PositiveInt = 1
    """Hypotheses that beam search keeps per prompt."""
    length_penalty: NonNegativeFloat = 0.6
    """Exponent of the length that beam search divides log-probabilities by: 0 favours short texts."""

    def __post_init__(self) -> None:
        if self.beams > 1 and self.temperature > 0:
            raise ConfigError(f"beam search (beams={self.beams}) does not sample; set temperature=0, or beams=1")
        if self.beams > 1 and self.repetition_penalty != 1:
            raise ConfigError(
                f"beam search (beams={self.beams}) has no repetition penalty; set repetition_penalty=1, or beams=1"
            )
