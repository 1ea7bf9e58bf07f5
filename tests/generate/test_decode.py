"""Text from prompts: greedy is the argmax of the whole forward, rows are independent, pieces join to the same text."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.data.tokenizers.tokenizer import bytes_table
from lmjax.errors import ConfigError, DataError
from lmjax.generate import rows
from lmjax.generate.config import GenerateConfig
from lmjax.generate.decode import generate, generate_ids, ready, stream
from lmjax.generate.writer import Writer, row_keys
from lmjax.models import decoder, flax_model
from lmjax.models.config import ModelConfig
from lmjax.models.model import Model
from lmjax.weights import Params, Weight, map_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENIZER = ByteTokenizer()
END = TOKENIZER.endoftext_id
IDS = {"endoftext": END, "vocab": TOKENIZER.vocab_size}
SMALL = {"vocab": TOKENIZER.vocab_size, "layers": 2, "embed": 24, "heads": 4, "mlp": 40}
SLIDING = ModelConfig(**SMALL, pattern=("local", "global"), window=4, kv_heads=2, tied=False)
GREEDY = GenerateConfig(tokens=12, temperature=0, stop_at_endoftext=False)
PROMPTS = ["To be, or not to be", "", "Wo"]


@functools.cache
def build(cfg: ModelConfig = SLIDING) -> tuple[Model, Params]:
    """A model and weights so uneven that its texts neither end at once nor settle on one token."""
    model, rng = decoder.build(cfg), np.random.default_rng(0)

    def draw(weight: Weight) -> jax.Array:
        return jnp.asarray(weight.unstacked().fan_in ** -0.5 * rng.standard_normal(weight.shape), jnp.float32)

    return model, map_weights(draw, model.spec)


def ending_model(target: str) -> tuple[Model, Params]:
    """A model without layers to speak of: after the last byte of `target` it ends the document, else it goes on."""
    model, params = build(ModelConfig(**SMALL | {"layers": 1, "embed": 320, "heads": 4}, tied=False, position="none"))
    after = {END: ord("a"), **{byte: (byte + 1) % 256 for byte in range(256)}, ord(target): END}
    params = jax.tree.map(jnp.zeros_like, params)
    params["final_norm"]["scale"] = jnp.ones(320)
    params["embed"] = jnp.eye(TOKENIZER.vocab_size, 320)
    for token, following in after.items():
        params["unembed"] = params["unembed"].at[token, following].set(1)
    return model, params


# Greedy -----------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_argmax_of_the_whole_forward() -> None:
    model, params = build()
    forward = jax.jit(model.logits)
    generations = generate(model, params, TOKENIZER, PROMPTS, GREEDY)
    for prompt, one in zip(PROMPTS, generations, strict=True):
        ids = TOKENIZER.encode(prompt) or [END]
        for token in one.ids:
            text_1T = np.zeros((1, 40), np.int32)
            text_1T[0, : len(ids)] = ids
            assert token == int(forward(params, text_1T)[0, len(ids) - 1].argmax())
            ids.append(token)
        assert len(one.ids) == GREEDY.tokens
    assert len({token for one in generations for token in one.ids}) > 3


def test_repetition_penalty_counts_the_prompt_and_the_text() -> None:
    model, params = build()
    cfg = dataclasses.replace(GREEDY, tokens=40, repetition_penalty=1e6)
    prompt = "abcd"
    (one,) = generate(model, params, TOKENIZER, [prompt], cfg)
    text = TOKENIZER.encode(prompt) + one.ids
    assert len(set(text)) == len(text)


def test_a_model_without_a_cache_generates() -> None:
    from flax import linen

    class Bigram(linen.Module):
        @linen.compact
        def __call__(self, tokens_BT: jax.Array) -> jax.Array:
            return linen.Embed(TOKENIZER.vocab_size, TOKENIZER.vocab_size)(tokens_BT)

    model, params = flax_model.from_linen(Bigram(), jnp.zeros((1, 4), jnp.int32), jax.random.key(0))
    following_V = np.asarray(jax.tree.leaves(params)[0]).argmax(axis=1)
    rows = generate(model, params, TOKENIZER, ["a", "xyz"], GREEDY)
    for prompt, row in zip(("a", "xyz"), rows, strict=True):
        chain = [ord(prompt[-1]), *row.ids]
        assert [int(following_V[token]) for token in chain[:-1]] == chain[1:]


# Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg",
    [GREEDY, dataclasses.replace(GREEDY, beams=3), dataclasses.replace(GREEDY, weights="int8")],
    ids=["greedy", "beams", "int8"],
)
def test_a_row_is_the_same_alone(cfg: GenerateConfig) -> None:
    model, params = build()
    together = generate(model, params, TOKENIZER, PROMPTS, cfg)
    alone = [generate(model, params, TOKENIZER, [prompt], cfg)[0] for prompt in PROMPTS]
    assert together == alone


def test_a_sampled_row_does_not_depend_on_its_neighbours() -> None:
    model, params = build()
    cfg = dataclasses.replace(GREEDY, temperature=0.9, top_p=0.95, repetition_penalty=1.1)
    one = generate(model, params, TOKENIZER, ["first", "second"], cfg)[1]
    other = generate(model, params, TOKENIZER, ["quite another and longer one", "second", "third"], cfg)[1]
    assert one == other


def test_equal_prompts_and_seeds_draw_different_texts() -> None:
    model, params = build()
    cfg = dataclasses.replace(GREEDY, temperature=1.0)
    first, second = generate(model, params, TOKENIZER, ["same", "same"], cfg)
    assert first != second
    assert [first, second] == generate(model, params, TOKENIZER, ["same", "same"], cfg)
    assert first != generate(model, params, TOKENIZER, ["same"], dataclasses.replace(cfg, seed=1))[0]


def test_all_bits_of_a_seed_count() -> None:
    seeds = [0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    keys = [tuple(np.asarray(jax.random.key_data(row_keys(seed, range(1)))).ravel()) for seed in seeds]
    assert len(set(keys)) == len(seeds)
    for seed, key in zip(seeds[:5], keys, strict=False):  # as they always were
        np.testing.assert_array_equal(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 0)), key)


def test_no_prompts_no_texts() -> None:
    assert generate(*build(), TOKENIZER, [], GREEDY) == []


# Ends -------------------------------------------------------------------------------------------------------------


def test_endoftext_ends_a_row_but_not_its_neighbours() -> None:
    model, params = ending_model("f")
    cfg = GenerateConfig(tokens=9, temperature=0)
    rows = generate(model, params, TOKENIZER, ["b", "x", "", "f"], cfg)
    assert [row.text for row in rows] == [
        "cdef",
        "yz{|}~\x7f\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}",
        "abcdef",
        "",
    ]
    assert [row.finished for row in rows] == [True, False, True, True]


def test_the_loop_stops_when_all_rows_have_ended() -> None:
    writer = Writer(*ending_model("f"), [b"e", b"a"], GenerateConfig(tokens=50, temperature=0), **IDS)
    assert writer.write(50) == [(0, [*b"f", END]), (1, [*b"bcdef", END])]
    assert not writer.is_writing


def test_endoftext_can_be_an_ordinary_token() -> None:
    model, params = ending_model("f")
    cfg = GenerateConfig(tokens=6, temperature=0, stop_at_endoftext=False)
    (row,) = generate(model, params, TOKENIZER, ["d"], cfg)
    assert row.ids == [ord("e"), ord("f"), END, ord("a"), ord("b"), ord("c")]
    assert not row.finished


class StoppingTokenizer(ByteTokenizer):
    """Ends a text with either of two ordinary bytes, and not with endoftext."""

    stop_ids = (ord("d"), ord("y"))


def test_any_of_several_tokens_ends_a_row() -> None:
    model, params = ending_model("f")
    cfg = GenerateConfig(tokens=9, temperature=0)
    rows = generate(model, params, StoppingTokenizer(), ["b", "w", "e", "0"], cfg)
    assert [(row.text, row.finished) for row in rows] == [
        ("c", True), ("x", True), ("fabc", True), ("123456789", False),
    ]  # fmt: skip
    assert rows[2].ids == [ord("f"), END, *b"abc"]
    for prompt, row in zip("bwe0", rows, strict=True):
        assert "".join(stream(model, params, StoppingTokenizer(), prompt, cfg, chunk=2)) == row.text
    (row,) = generate(model, params, StoppingTokenizer(), ["b"], dataclasses.replace(cfg, stop_at_endoftext=False))
    assert row.text == "cdefabcd" and not row.finished


# Lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("prompts", [["", "abcdefghi"], ["c"]], ids=["uneven", "alone"])
def test_few_tokens_are_the_first_of_many(prompts: list[str], tokens: int) -> None:
    model, params = build()
    cfg = dataclasses.replace(GREEDY, tokens=tokens)
    rows = generate(model, params, TOKENIZER, prompts, cfg)
    longer = generate(model, params, TOKENIZER, prompts, GREEDY)
    assert [row.ids for row in rows] == [row.ids[:tokens] for row in longer]
    assert "".join(stream(model, params, TOKENIZER, prompts[0], cfg, chunk=1)) == rows[0].text


def test_one_token_is_the_same_with_beams() -> None:
    cfg = dataclasses.replace(GREEDY, tokens=1)
    rows = generate(*build(), TOKENIZER, PROMPTS, cfg)
    assert rows == generate(*build(), TOKENIZER, PROMPTS, dataclasses.replace(cfg, beams=2))


@pytest.mark.parametrize(("context", "beams"), [(16, 1), (10, 1), (10, 2)])
def test_learned_positions_are_used_to_the_last(context: int, beams: int) -> None:
    """A text of the table's length has one more token after it, which needs no position."""
    model, params = build(ModelConfig(**SMALL, context=context, position="learned"))
    for prompt in ("1234567", "1" * context):
        room = context - len(prompt) + 1
        cfg = GenerateConfig(tokens=room, temperature=0, beams=beams, stop_at_endoftext=False)
        (row,) = generate(model, params, TOKENIZER, [prompt], cfg)
        assert len(row.ids) == room
        if beams == 1:
            assert "".join(stream(model, params, TOKENIZER, prompt, cfg, chunk=3)) == row.text
            text_1T = np.array([[*prompt.encode(), *row.ids[:-1]]])
            assert int(model.logits(params, text_1T)[0, -1].argmax()) == row.ids[-1]
        more = dataclasses.replace(cfg, tokens=room + 1)
        with pytest.raises(ConfigError, match=rf"model.context={context}; ask for at most {room} tokens"):
            generate(model, params, TOKENIZER, ["1", prompt], more)
    with pytest.raises(ConfigError, match=rf"prompt of {context + 1} tokens .* model.context={context}; shorten it"):
        stream(model, params, TOKENIZER, "1" * (context + 1), dataclasses.replace(GREEDY, tokens=1))


def test_a_token_beyond_the_table_is_refused() -> None:
    model, params = build()
    with pytest.raises(DataError, match="a prompt has token 300, and the model's table only 257 rows"):
        generate(model, params, TOKENIZER, [[1, 300], [2]], GREEDY)


def test_rotary_positions_go_on() -> None:
    model, params = build(ModelConfig(**SMALL, context=16))
    (one,) = generate(model, params, TOKENIZER, ["1234567"], dataclasses.replace(GREEDY, tokens=30))
    assert len(one.ids) == 30


@pytest.mark.parametrize(
    "cfg", [GREEDY, dataclasses.replace(GREEDY, weights="int8"), dataclasses.replace(GREEDY, beams=2)]
)
def test_weights_are_laid_out_once_for_many_calls(cfg: GenerateConfig) -> None:
    model, params = build()
    expected, weights = generate(model, params, TOKENIZER, PROMPTS, cfg), ready(model, params, cfg)
    other = model._replace(unstack=None)  # type: ignore[arg-type]
    assert generate(other, weights, TOKENIZER, PROMPTS, cfg) == expected
    if cfg.beams == 1:
        assert "".join(stream(other, weights, TOKENIZER, PROMPTS[0], cfg)) == expected[0].text


@pytest.mark.parametrize("bits", [None, "int8"])
def test_no_length_of_prompt_or_text_compiles_anything(bits: Literal["int8"] | None) -> None:
    """While both together stay below the same power of two. Nor does another seed, whether it stops, or who waits."""
    model, params = build()
    cfg = dataclasses.replace(GREEDY, tokens=5, seed=3, rows=4, weights=bits)
    programs = (rows.empty_rows, rows.empty_memory, rows.read, rows.admit, rows.advance)
    generate(model, params, TOKENIZER, ["a" * 129, "b", "c", "d", "e"], cfg)
    before = [program._cache_size() for program in programs]
    stopping = dataclasses.replace(cfg, tokens=90, seed=4, stop_at_endoftext=True)
    generate(model, params, TOKENIZER, ["a" * 150, "", *"bcdefgh"], stopping)
    assert [program._cache_size() for program in programs] == before


# More prompts than rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_the_same_in_whatever_rows_they_are_written(temperature: float) -> None:
    """Also around the ends of rings, behind texts that filled sliding windows."""
    cfg = GenerateConfig(tokens=40, temperature=temperature, repetition_penalty=1.1)
    rng = np.random.default_rng(0)
    prompts = [bytes(rng.integers(32, 127, int(length))).decode() for length in (3, 90, 1, 200, 64, 7, 130, 30, 2)]
    model, params = build()
    in_two_rows = generate(model, params, TOKENIZER, prompts, dataclasses.replace(cfg, rows=2))
    if temperature:  # draws are named by a prompt's place
        assert in_two_rows == generate(model, params, TOKENIZER, prompts, cfg)
    else:
        assert in_two_rows == [generate(model, params, TOKENIZER, [prompt], cfg)[0] for prompt in prompts]


def test_the_next_prompt_takes_a_row_as_soon_as_it_is_free() -> None:
    writer = Writer(*ending_model("f"), [b"e", b"a", b"d"], GenerateConfig(tokens=9, temperature=0, rows=2), **IDS)
    assert writer.write(50) == [(0, [*b"f", END]), (1, [*b"bc"])]
    assert writer.write(50) == [(2, [*b"ef", END]), (1, [*b"def", END])]
    assert not writer.is_writing


# Streaming --------------------------------------------------------------------------------------------------------


class MultibyteTokenizer(ByteTokenizer):
    """Every id spells one byte of a text of two- to four-byte characters, so that any cut is inside one."""

    def __init__(self) -> None:
        text = "\u00e9\u6f22\U0001f600\u0646".encode()
        self._bytes = bytes_table([*(text[i % len(text) :][:1] for i in range(256)), b""])


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (3, 0.0)])
def test_pieces_join_to_the_text(chunk: int, temperature: float) -> None:
    model, params = build()
    cfg = GenerateConfig(tokens=17, temperature=temperature)
    for tokenizer in (TOKENIZER, MultibyteTokenizer()):
        pieces = list(stream(model, params, tokenizer, "Once", cfg, chunk=chunk))
        assert "".join(pieces) == generate(model, params, tokenizer, ["Once"], cfg)[0].text
        assert len(pieces) > (17 - 1) // chunk // 5


def test_a_character_is_never_cut() -> None:
    model, params = ending_model("z")  # every byte from "a" on follows the one before
    pieces = list(stream(model, params, MultibyteTokenizer(), "", GenerateConfig(tokens=26, temperature=0), chunk=1))
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[1:-1])
    assert set(map(len, pieces[1:-1])) == {1}


def test_streaming_stops_at_endoftext() -> None:
    pieces = list(stream(*ending_model("f"), TOKENIZER, "b", GenerateConfig(tokens=50, temperature=0), chunk=3))
    assert pieces == ["c", "def"]


def test_beams_do_not_stream() -> None:
    with pytest.raises(ConfigError, match="cannot stream"):
        stream(*build(), TOKENIZER, "b", dataclasses.replace(GREEDY, beams=2))


def test_ids_in_ids_out() -> None:
    model, params = build()
    texts = generate(model, params, TOKENIZER, PROMPTS, GREEDY)
    prompts = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    assert generate_ids(model, params, prompts, GREEDY, endoftext=END, vocab=257) == [text.ids for text in texts]
