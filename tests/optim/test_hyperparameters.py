"""Each rule says what its source says, names what lies outside its range, and moves the way that it must."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lmjax.errors import ConfigError
from lmjax.optim.config import OptimizerConfig
from lmjax.optim.hyperparameters import (
    NANOCHAT_BATCH,
    NANOCHAT_TOKENS,
    RULES,
    Advice,
    Scale,
    deepseek_flops,
    find_rule,
    nanochat_batch,
    porian_batch,
    porian_rate,
    read_law,
    rows,
    updates,
)
from lmjax.optim.muon import ADAMW_RMS
from lmjax.schema import validated

BATCH = 2.0**19


def scale(layers: int = 12, width: int = 768, tokens: float = 3e9, sequence: int = 2048, **params: float) -> Scale:
    """A plain decoder, N = 12 L d^2 without a vocabulary."""
    body = 12.0 * layers * width**2
    counts = {"layers": body} | dict.fromkeys(("matmul", "total", "active", "non_embedding"), body + 32e3 * width)
    return Scale(tokens, width, layers, sequence, counts | params)


def said(rule: str, at: Scale, batch: float = BATCH) -> Advice:
    return RULES[rule].advise(at, batch)


def batch_of(rule: str, at: Scale) -> float:
    batch = RULES[rule].batch
    assert batch is not None
    return batch(at)


def rate_of(rule: str, at: Scale, batch: float = BATCH) -> float:
    rate = said(rule, at, batch).learning_rate
    assert rate is not None
    return rate


# Worked values of the sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "width", "per_token"),
    [
        (8, 512, 352e6),
        (12, 768, 963e6),
        (24, 1024, 3.02e9),
        (24, 2048, 9.66e9),
        (32, 4096, 45.1e9),
        (40, 5120, 85.6e9),
        (80, 8192, 419e9),
    ],
)
def test_deepseek_flops_a_token_are_those_of_its_table_3(layers: int, width: int, per_token: float) -> None:
    """Equation 2 at 4096 tokens a row."""
    assert deepseek_flops(scale(layers, width, tokens=1.0, sequence=4096)) == pytest.approx(per_token, rel=2e-3)


@pytest.mark.parametrize(("layers", "width", "rate", "sequences"), [(30, 4096, 4.2e-4, 2304), (95, 8192, 3.2e-4, 4608)])
def test_deepseek_sets_its_7b_and_67b_as_in_its_table_2(layers: int, width: int, rate: float, sequences: int) -> None:
    """Equation 1 at 2T tokens; the authors rounded, the batch by up to a tenth."""
    at = scale(layers, width, tokens=2e12, sequence=4096)
    assert rate_of("deepseek", at) == pytest.approx(rate, rel=0.03)
    assert batch_of("deepseek", at) / 4096 == pytest.approx(sequences, rel=0.1)


@pytest.mark.parametrize(
    ("flops", "rate", "batch"),
    [(1e17, 2.3382e-3, 1.0619e5), (1e18, 1.7534e-3, 2.2547e5), (2e19, 1.2057e-3, 6.0083e5)],
)
def test_deepseek_over_the_range_of_its_fit(flops: float, rate: float, batch: float) -> None:
    """Equation 1 at round budgets, by hand: ln 1e17 = 39.1439, ln 1e18 = 41.4465, ln 2e19 = 44.4422."""
    at = scale(tokens=flops / deepseek_flops(scale(tokens=1.0)))
    assert rate_of("deepseek", at) == pytest.approx(rate, rel=1e-3)
    assert batch_of("deepseek", at) == pytest.approx(batch, rel=1e-3)


@pytest.mark.parametrize(
    ("params", "tokens", "rate", "batch"),
    [
        (2**30, 1e11, 1.552e-3, 1.108e6),
        (214_663_680, 1e11, 4.891e-3, 1.108e6),
        (214_663_680, 4e9, 1.821e-3, 1.763e5),
        (536_872_960, 5e10, 2.058e-3, 7.457e5),
    ],
)
def test_step_law_at_points_of_its_grid(params: float, tokens: float, rate: float, batch: float) -> None:
    """Equation 1 with table 2: 1.79 N^-0.713 D^0.307 and 0.58 D^0.571 at N and D of table 5."""
    at = scale(tokens=tokens, layers=12, width=768)
    at = Scale(at.tokens, at.width, at.layers, at.sequence, {"layers": params})
    assert rate_of("step_law", at) == pytest.approx(rate, rel=2e-3)
    assert batch_of("step_law", at) == pytest.approx(batch, rel=2e-3)
    final = said("step_law", at).final_fraction
    assert final is not None and final * rate_of("step_law", at) == pytest.approx(1e-5)


# N with the head, batch in sequences of 2048, rate: params_bs_map and params_lr_map of the released notebook.
PORIAN = [
    (5173248, 20, 1.30e-2),
    (9809920, 32, 1.05e-2),
    (22487040, 56, 8.0e-3),
    (57384960, 104, 5.9e-3),
    (108462080, 160, 4.7e-3),
    (220872704, 256, 3.8e-3),
    (455311360, 448, 3.0e-3),
    (901726208, 640, 2.4e-3),
]


@pytest.mark.parametrize(("params", "sequences", "rate"), PORIAN)
def test_porian_sets_the_tuned_runs_as_they_were(params: int, sequences: int, rate: float) -> None:
    """The released values are rounded, batches to what divides over devices."""
    at = scale(matmul=params)
    assert rate_of("porian", at) == pytest.approx(rate, rel=0.04)
    assert batch_of("porian", at) / 2048 == pytest.approx(sequences, rel=0.07)
    assert said("porian", at, batch=params / 100).warmup == 100  # of N tokens


def test_porian_agrees_with_the_power_laws_quoted_of_it() -> None:
    """Step Law's table 1 has 3.7 N^-0.36 and 0.7576 N^0.703 tokens."""
    for params, _, _ in PORIAN:
        assert porian_rate(params) == pytest.approx(3.7 * params**-0.36, rel=0.1)
        assert porian_batch(params) == pytest.approx(0.7576 * params**0.703, rel=0.11)


@pytest.mark.parametrize(
    ("params", "sequences", "rate"),
    [
        (190_354_176, 116.73, 9.7273e-4),
        (371_262_464, 182.22, 7.7855e-4),
        (758_220_288, 293.32, 6.1364e-4),
        (1_279_395_840, 415.73, 5.1544e-4),
    ],
)
def test_the_olmo_ladder_at_its_four_sizes(params: int, sequences: float, rate: float) -> None:
    """src/ladder/ladder.py at MODEL_PARAMS and 4096 tokens a row, before it rounds the batch."""
    at = scale(sequence=4096, matmul=params)
    batch = batch_of("olmo_ladder", at)
    assert batch / 4096 == pytest.approx(sequences, rel=1e-4)
    assert rate_of("olmo_ladder", at, batch) == pytest.approx(rate, rel=1e-4)
    assert said("olmo_ladder", at, batch).warmup == round(params / batch)
    assert rate_of("olmo_ladder", scale(sequence=2048, matmul=params)) == pytest.approx(4 * rate, rel=1e-4)


@pytest.mark.parametrize(
    ("sequences", "width", "rate", "b2"),
    [(128, 1024, 3.6460e-3, 0.98), (256, 2048, 2.5781e-3, 0.9604), (8, 512, 1.8230e-3, 0.998738)],
)
def test_marin_at_batches_of_its_recipe(sequences: int, width: int, rate: float, b2: float) -> None:
    """0.33 sqrt(B) / d and 0.98^(B / 128)."""
    advice = said("marin", scale(width=width, tokens=1e10), batch=sequences * 4096.0)
    assert advice.learning_rate == pytest.approx(rate, rel=1e-4)
    assert advice.b2 == pytest.approx(b2, rel=1e-5)
    assert (advice.b1, advice.eps, advice.weight_decay) == (0.95, 1e-15, 0.1)
    assert advice.warmup == round(0.1 * 1e10 / (sequences * 4096))


@pytest.mark.parametrize(("ratio", "batch"), [(1.0, 524288), (2.0, 683700), (8.0, 1162700)])
def test_nanochat_raises_the_batch_with_the_tokens(ratio: float, batch: float) -> None:
    """2^19 (D / D_ref)^0.383, with D_ref = 12 x 110,100,912."""
    assert NANOCHAT_TOKENS == 12 * 110_100_912
    assert nanochat_batch(scale(tokens=ratio * NANOCHAT_TOKENS)) == pytest.approx(batch, rel=1e-4)


@pytest.mark.parametrize(("ratio", "larger"), [(1.0, 1.0), (4.0, 1.0), (4.0, 2.0)])
@pytest.mark.parametrize("width", [640, 768, 1280])
def test_nanochat_in_our_units_moves_weights_as_it_does(ratio: float, larger: float, width: int) -> None:
    """Of a square matrix: 0.02 sqrt(B / B_ref) U V' a step; rate x decay as there, 0.28 being halved for its fall."""
    advice = said("nanochat", scale(width=width, tokens=ratio * NANOCHAT_TOKENS), batch=larger * NANOCHAT_BATCH)
    assert advice.learning_rate is not None and advice.weight_decay is not None
    step = advice.learning_rate * ADAMW_RMS * math.sqrt(width)
    assert step == pytest.approx(0.02 * math.sqrt(larger))
    theirs = 0.02 * math.sqrt(larger) * 0.28 * math.sqrt(larger) / ratio
    assert advice.learning_rate * advice.weight_decay == pytest.approx(theirs / 2)


# Ranges -----------------------------------------------------------------------------------------------------------

OUTSIDE = {
    "deepseek": (scale(tokens=1e12), "C (DeepSeek's) = "),
    "marin": (scale(width=384), "width = 384 is outside 512 to 4.1e+03"),
    "nanochat": (scale(width=2048), "width = 2.05e+03 is outside 640 to 1.28e+03"),
    "olmo_ladder": (scale(sequence=512, matmul=3e8), "tokens a row = 512 is outside 2.05e+03 to 4.1e+03"),
    "porian": (scale(matmul=7e9), "N (matmul) = 7e+09 is outside 5.1e+06 to 9.1e+08"),
    "step_law": (scale(tokens=1e9), "D = 1e+09 is outside 2e+09 to 1e+11"),
}
INSIDE = {
    "deepseek": scale(tokens=1e9),
    "marin": scale(width=1024),
    "nanochat": scale(),
    "olmo_ladder": scale(matmul=3e8),
    "porian": scale(matmul=3e8),
    "step_law": scale(),
}


@pytest.mark.parametrize("name", RULES)
def test_outside_its_range_a_rule_names_quantity_and_range(name: str) -> None:
    at, says = OUTSIDE[name]
    (warning,) = RULES[name].warnings(at, BATCH)
    assert warning.startswith(says) and warning.endswith(", where the rule was fitted")
    assert RULES[name].warnings(INSIDE[name], BATCH) == []


def test_a_rate_that_marin_would_reject_is_named() -> None:
    assert RULES["marin"].warnings(scale(width=512), 4096 * 1024.0) == [
        "learning rate = 0.0206 is outside 0 to 0.01, where the rule was fitted"
    ]


def test_n_that_takes_a_vocabulary_is_asked_for() -> None:
    at = Scale(1e9, 768, 12, 2048, {"layers": 8.5e7})
    for name in ("porian", "olmo_ladder"):
        with pytest.raises(ConfigError, match=r"^N counted as 'matmul' needs the vocabulary: set model\.vocab$"):
            batch_of(name, at)
    assert said("step_law", at).learning_rate and said("deepseek", at).learning_rate


# What every rule keeps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("width", [512, 1024, 4096])
@pytest.mark.parametrize("tokens", [1e8, 1e10, 1e12])
def test_what_a_rule_says_are_settings(name: str, width: int, tokens: float) -> None:
    settings = said(name, scale(width=width, tokens=tokens)).settings()
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        first, *groups, last = key.split(".")
        assert first == "optimizer"
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    validated(OptimizerConfig, tree | {"name": RULES[name].optimizer})
    assert RULES[name].source and RULES[name].fitted


@pytest.mark.parametrize("name", ["deepseek", "nanochat", "olmo_ladder", "porian", "step_law"])
def test_batches_never_fall_with_the_run(name: str) -> None:
    runs = [scale(layers, 64 * layers, tokens=20 * 12 * 64**2 * layers**3) for layers in (8, 12, 24, 40)]
    batches = [batch_of(name, at) for at in runs]
    assert batches == sorted(batches) and batches[0] < batches[-1]


@pytest.mark.parametrize("name", ["deepseek", "marin", "nanochat", "olmo_ladder", "porian", "step_law"])
def test_rates_fall_with_the_width(name: str) -> None:
    rates = [rate_of(name, scale(width=width)) for width in (256, 512, 1024, 4096)]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]


def test_nanochat_keeps_adamws_timescale() -> None:
    """rate x decay x steps, arXiv:2405.13698, is the same for every width, batch and length."""
    timescales = []
    for width in (640, 1280):
        for tokens in (1e9, 1e10):
            for batch in (2.0**18, 2.0**21):
                advice = said("nanochat", scale(width=width, tokens=tokens), batch)
                assert advice.learning_rate is not None and advice.weight_decay is not None
                timescales.append(advice.learning_rate * advice.weight_decay * tokens / batch)
    assert timescales == pytest.approx([timescales[0]] * len(timescales))


@pytest.mark.parametrize(("batch", "sequence", "multiple"), [(5e5, 2048, 1), (1e3, 4096, 1), (3e6, 1024, 24)])
def test_rows_are_the_nearest_power_of_two(batch: float, sequence: int, multiple: int) -> None:
    count = rows(batch, sequence, multiple)
    power = count // multiple
    assert count % multiple == 0 and power & (power - 1) == 0 and power >= 1
    assert power == 1 or 2**-0.5 <= count * sequence / batch <= 2**0.5
    assert rows(sequence * 8.0, sequence) == 8


def test_updates_come_nearest_to_the_tokens() -> None:
    assert (updates(1e6, 1e5), updates(1.06e6, 1e5), updates(1.0, 1e5)) == (10, 11, 1)


# One's own laws ---------------------------------------------------------------------------------------------------

LAW: dict[str, Any] = {
    "format": 1,
    "params": "total",
    "params_range": [1e7, 1e9],
    "tokens_range": [2e8, 2e10],
    "laws": {
        "learning_rate": {
            "log_coefficient": math.log(2.0),
            "params_exponent": -0.5,
            "tokens_exponent": 0.1,
            "residual_sd": 0.1,
        },
        "batch_tokens": {"log_coefficient": math.log(3.0), "params_exponent": 0.0, "tokens_exponent": 0.5},
    },
}


def written(directory: Path, law: Any) -> str:
    path = directory / "law.json"
    path.write_text(law if isinstance(law, str) else json.dumps(law))
    return str(path)


def test_a_law_of_ones_own_is_a_rule(tmp_path: Path) -> None:
    rule = find_rule(written(tmp_path, LAW))
    at = scale(total=1e8, tokens=1e10)
    assert rule.batch is not None and rule.batch(at) == pytest.approx(3.0 * 1e5)
    assert rule.advise(at, BATCH) == Advice(learning_rate=pytest.approx(2.0 * 1e-4 * 10.0))
    assert rule.warnings(at, BATCH) == []
    assert rule.warnings(scale(total=1e10, tokens=1e11), BATCH) == [
        "N (total) = 1e+10 is outside 1e+07 to 1e+09, where the rule was fitted",
        "D = 1e+11 is outside 2e+08 to 2e+10, where the rule was fitted",
    ]


def test_a_law_of_the_batch_alone_says_nothing_else(tmp_path: Path) -> None:
    law = LAW | {"laws": {"batch_tokens": LAW["laws"]["batch_tokens"]}}
    assert read_law(written(tmp_path, law)).advise(scale(), BATCH).settings() == {}
    law = LAW | {"laws": {"learning_rate": LAW["laws"]["learning_rate"]}}
    assert read_law(written(tmp_path, law)).batch is None


@pytest.mark.parametrize(
    ("law", "says"),
    [
        (LAW | {"laws": {}}, "has no law: the sweep behind it tried too few learning rates and batches"),
        (LAW | {"laws": {"momentum": {}}}, "has no law"),
        (LAW | {"params": "as labelled"}, "counts N as 'as labelled', which is no count of a config"),
        (LAW | {"format": 2}, "has format 2, this lmjax reads 1"),
        (LAW | {"laws": {"learning_rate": {"log_coefficient": "much"}}}, r"is no law\.json"),
        (LAW | {"params_range": None}, r"is no law\.json"),
        ({"inputs": {}}, r"is no law\.json"),
        ("[1, 2]", r"is no law\.json"),
        ("not json", r"is no law\.json"),
        ("[" * 100_000, r"is no law\.json"),
    ],
)
def test_what_is_no_law_is_refused_in_one_line(tmp_path: Path, law: Any, says: str) -> None:
    path = written(tmp_path, law)
    with pytest.raises(ConfigError, match=f"^{path}: {says}") as refused:
        read_law(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_names_that_no_rule_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^there is no rule 'step_lw' \(did you mean 'step_law'\?\)$"):
        find_rule("step_lw")
    with pytest.raises(ConfigError, match=r"choose one of deepseek, .*, or a law\.json"):
        find_rule("")
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        find_rule(str(tmp_path / "none.json"))
