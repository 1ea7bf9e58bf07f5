"""What is scored: examples checked by hand, as text (a byte is a token here), and the masks of transformers."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lmjax.data.chat.conversation import read_conversation
from lmjax.data.chat.rendering import Renderer
from lmjax.data.chat.scoring import Scored, encode_conversation
from lmjax.data.chat.templates import TEMPLATES, Template
from lmjax.data.config import ChatConfig
from lmjax.data.tokenizers.alphabets import ByteTokenizer
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.tokenizer import ENDOFTEXT
from lmjax.errors import DataError

pytest.importorskip("jinja2")

PLAIN = {  # without marks
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "no header": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[Q]{{ m.content }}[/Q]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "tools": "{% if tools %}<tools>{{ tools | tojson }}</>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}call {{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}"
    "</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
}
MARKED = {
    # It leaves the thoughts out of earlier turns, and announces a turn with words that it does not always write.
    "forgets": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('|')[-1] }}</>{% endgeneration %}"
    "{% else %}{{ m.content }}</>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>Hm: {% endif %}",
    "content alone": "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}</>{% endfor %}",
}
BROKEN = {
    "forgets": MARKED["forgets"].replace("{% generation %}", "").replace("{% endgeneration %}", ""),
    "no announcement": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}",
    "one mark": "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}end{% endgeneration %}",
    "marks that show": "{% set x %}{% for m in messages %}{% generation %} {{ m.content }}{% endgeneration %}"
    "{% endfor %}{% endset %}{{ x | trim }}",
    "raises": "{{ raise_exception('not today') }}",
}

ONE = {"prompt": "2+2?", "response": "4."}
INPUT = {"instruction": "Add.", "input": "2, 2", "output": "4."}
TWO = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "hm|b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "é"},
    ]
}
SYSTEM = {"messages": [{"role": "system", "content": "Brief."}, *TWO["messages"]]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
TOOLS = {
    "tools": [{"name": "add"}],
    "messages": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ],
}
END = ENDOFTEXT  # stands for the token that closes a document


@pytest.fixture(scope="module")
def encode() -> Iterator[Callable[..., Scored]]:
    """encode(template, conversation, tokenizer, **settings), with one process for each template."""
    renderers: dict[str, Renderer] = {}

    def scored(source: str, conversation: Any, tokenizer: Any = None, **settings: Any) -> Scored:
        symbols = {"bos_token": "<s>", "eos_token": END}
        if source not in renderers:
            renderers[source] = Renderer(Template(source, symbols, "DIR")).__enter__()
        cfg = ChatConfig(template="chatml", **settings)
        return encode_conversation(json.dumps(conversation), tokenizer or ByteTokenizer(), renderers[source], cfg)

    yield scored
    for renderer in renderers.values():
        renderer.__exit__()


def pieces(found: Scored) -> list[str]:
    """Text that is not scored and text that is, in turns."""
    scored = found.weights > 0
    edges = [0, *(np.flatnonzero(np.diff(scored.astype(int))) + 1), len(found.tokens)]
    spelled = [
        b"".join(END.encode() if token == 256 else bytes([token]) for token in found.tokens[low:high]).decode()
        for low, high in itertools.pairwise(edges)
    ]
    return ["", *spelled] if scored[0] else spelled


@pytest.mark.parametrize(
    ("template", "conversation", "settings", "expected"),
    [
        ("instruction", ONE, {}, ["[instruction]\n2+2?[end]\n[response]\n", f"4.[end]{END}"]),
        ("instruction", INPUT, {}, ["[instruction]\nAdd.\n\n2, 2[end]\n[response]\n", f"4.[end]{END}"]),
        ("instruction", ONE, {"ends": False}, ["[instruction]\n2+2?[end]\n[response]\n", "4.", f"[end]{END}"]),
        ("instruction", ONE, {"headers": True}, ["[instruction]\n2+2?[end]\n", f"[response]\n4.[end]{END}"]),
        ("instruction", ONE, {"score": "all"}, ["[", f"instruction]\n2+2?[end]\n[response]\n4.[end]{END}"]),
        (
            "instruction",
            TWO,
            {},
            [
                "[instruction]\na[end]\n[response]\n",
                "hm|b[end]",
                "\n[instruction]\nc[end]\n[response]\n",
                f"é[end]{END}",
            ],
        ),
        (
            "alpaca",
            INPUT,
            {},
            [
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n"
                "2, 2\n\n### Response:",
                f"4.{END}",
            ],
        ),
        (
            "alpaca",
            ONE,
            {"ends": False},
            [
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                "request.\n\n### Instruction:\n2+2?\n\n### Response:",
                "4.",
                END,
            ],
        ),
        (
            "alpaca",
            SYSTEM,
            {},
            [
                "Brief.\n\n### Instruction:\na\n\n### Response:",
                f"hm|b{END}",
                "\n\n### Instruction:\nc\n\n### Response:",
                f"é{END}",
            ],
        ),
        (
            "chatml",
            SYSTEM,
            {},
            [
                "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
                "hm|b<|im_end|>\n",
                "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
                f"é<|im_end|>\n{END}",
            ],
        ),
        ("plain", TWO, {}, ["<user>a</><assistant>", "hm|b</>", "<user>c</><assistant>", f"é</>{END}"]),
        ("plain", SYSTEM, {"score": "last"}, [
            "<system>Brief.</><user>a</><assistant>hm|b</><user>c</><assistant>", f"é</>{END}",
        ]),
        ("plain", TWO, {"headers": True, "ends": False}, [
            "<user>a</>", "<assistant>hm|b", "</><user>c</>", "<assistant>é", f"</>{END}",
        ]),
        ("no header", TWO, {}, ["<s>[Q]a[/Q]", f" hm|b{END}", "[Q]c[/Q]", f" é{END}"]),
        ("tools", TOOLS, {}, [
            '<tools>[{"name": "add"}]</><user>2+2?</><assistant>', 'call add{"x": 2}</>', "<tool>4</><assistant>",
            f"It is 4.</>{END}",
        ]),
        ("forgets", TWO, {}, ["<user>a</><assistant>", "b</>", "<user>c</><assistant>", f"é</>{END}"]),
        ("forgets", TWO, {"score": "last"}, ["<user>a</><assistant>b</><user>c</><assistant>", f"é</>{END}"]),
        # What a template marks is what the assistant writes: an end mark that is left out is not learned.
        ("content alone", TWO, {}, ["<user>a</><assistant>", "hm|b", "</><user>c</><assistant>", "é", f"</>{END}"]),
    ],
)  # fmt: skip
def test_what_is_scored(
    encode: Callable[..., Scored], template: str, conversation: Any, settings: dict[str, Any], expected: list[str]
) -> None:
    found = encode((TEMPLATES | PLAIN | MARKED)[template], conversation, **settings)
    assert pieces(found) == expected
    scored = "".join(expected[1::2])
    assert (found.weights > 0).sum() == len(scored.replace(END, "x").encode())  # to the token
    assert found.n_bytes == len(scored.replace(END, "").encode())


@pytest.mark.parametrize("source", [PLAIN["plain"], MARKED["forgets"]])
def test_a_message_counts_what_its_weight_says(encode: Callable[..., Scored], source: str) -> None:
    """To the token, its end included; the end of text has the weight of the last one."""
    uneven = [{**message, "weight": [1, 0.25, 1, 0.5][number]} for number, message in enumerate(TWO["messages"])]
    found, even = encode(source, {"messages": uneven}), encode(source, TWO)
    assert found.tokens == even.tokens and found.n_bytes == even.n_bytes
    assert (found.weights > 0).tolist() == (even.weights == 100).tolist()
    first, last = (len(piece.replace(END, "x").encode()) for piece in pieces(even)[1::2])
    assert found.weights[found.weights > 0].tolist() == [25] * first + [50] * last


def test_a_message_may_be_left_out(encode: Callable[..., Scored]) -> None:
    weighted = [{**message, "weight": number % 4 // 3} for number, message in enumerate(TWO["messages"])]
    for source in (PLAIN["plain"], MARKED["forgets"]):
        assert pieces(encode(source, {"messages": weighted}))[1:] == [f"é</>{END}"]


@pytest.mark.parametrize(
    ("template", "conversation", "settings", "message"),
    [
        ("forgets", TWO, {}, r"message 2: the chat template does not write it as it announces it, or .* mark that in"),
        ("no announcement", ONE, {}, r"message 2: the chat template has no add_generation_prompt"),
        ("one mark", TWO, {}, r"DIR marks 1 passages as written by the assistant, who has 2 messages"),
        ("marks that show", ONE, {}, r"its marks {% generation %} change the text"),
        ("raises", ONE, {}, r"the chat template in DIR failed: TemplateError: not today"),
        ("instruction", SYSTEM, {}, r"failed: TemplateError: it has no words for a message of system"),
        ("alpaca", TOOLS, {}, r"failed: TemplateError: it has no words for tools"),
        ("chatml", TOOLS["messages"], {}, r"no conversation but list"),
        ("tools", TOOLS, {"ends": False}, r"message 2 does not stand in the text as it is, so .*; use ends"),
        ("plain", {"question": "a", "answer": "b"}, {}, r"no conversation among its fields \['answer', 'question'\]"),
        ("plain", {"prompt": "a"}, {}, r"no string under 'response' but fields \['prompt'\]"),
        ("plain", {"prompt": "a", "response": None}, {}, r"no string under 'response' but NoneType"),
        ("plain", {"prompt": "a", "response": " \n"}, {}, r"its 'response' is empty; fill it in, or remove the line"),
        ("plain", {"instruction": "a", "output": ""}, {}, r"its 'output' is empty"),
        ("plain", {"instruction": "", "output": "b"}, {}, r"its 'instruction' is empty"),
        ("plain", {"messages": []}, {}, r"no list of messages under 'messages' but list"),
        ("plain", {"messages": ["a"]}, {}, r"message 1 has no role"),
        ("plain", {"messages": TWO["messages"][:1]}, {}, r"no message of the assistant: there is nothing to learn"),
        ("plain", {"messages": [{"role": "assistant", "content": ""}]}, {}, r"message 1, the assistant's, is empty"),
        ("plain", {"messages": [{"role": "user", "content": [{}]}]}, {}, r"message 1 has no text as content but list"),
        ("plain", {"messages": [{"role": "user", "content": "", "weight": 1.5}]}, {}, r"message 1 has weight=1\.5"),
        ("plain", {"messages": [{"role": "user", "content": "", "weight": 0.125}]}, {}, r"weight=0\.125: .* two decim"),
        ("plain", {"messages": [{"role": "user", "content": "", "weight": True}]}, {}, r"message 1 has weight=True"),
        ("plain", {"messages": [{"role": "user", "content": "", "weight": float("nan")}]}, {}, r"has weight=nan"),
        ("plain", {"prompt": "a", "response": "\ud800"}, {}, r"unpaired surrogate U\+D800"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_named(
    encode: Callable[..., Scored], template: str, conversation: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        encode((TEMPLATES | PLAIN | BROKEN)[template], conversation, **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 330


def test_all_can_be_scored_where_nothing_tells_what_the_assistant_wrote(encode: Callable[..., Scored]) -> None:
    for name in ("forgets", "no announcement"):
        assert encode(BROKEN[name], TWO, score="all").weights[1:].all()


def test_too_long_ones_are_refused_or_cut(encode: Callable[..., Scored]) -> None:
    """24 tokens before what is scored, and 6 that are."""
    source, whole = PLAIN["plain"], encode(PLAIN["plain"], ONE, longest=30)
    assert pieces(whole) == ["<user>2+2?</><assistant>", f"4.</>{END}"] and not whole.truncated
    with pytest.raises(DataError, match=r"30 tokens, 24 of them before what is scored, more than chat\.longest=29"):
        encode(source, ONE, longest=29)
    left, right = (encode(source, ONE, longest=27, too_long=side) for side in ("left", "right"))
    assert pieces(left) == ["er>2+2?</><assistant>", f"4.</>{END}"] and left.truncated and left.n_bytes == 5
    assert pieces(right) == ["<user>2+2?</><assistant>", "4.", END] and right.truncated and right.n_bytes == 2
    for side, longest in (("right", 25), ("left", 1)):
        with pytest.raises(DataError, match=f"none of its 30 tokens is scored once it is cut at its {side}"):
            encode(source, ONE, longest=longest, too_long=side)


def byte_level(symbols: list[str]) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    space, word = "Ġ", "ab"
    vocab = {token: index for index, token in enumerate([*alphabet, word, space + word])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b"), (space, word)]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(symbols)
    return made


@pytest.mark.parametrize("name", ["instruction", "alpaca", "chatml", "forgets"])
def test_the_masks_are_those_of_transformers(encode: Callable[..., Scored], name: str) -> None:
    """Of templates with marks, with merges of a space and a word, and symbols."""
    transformers = pytest.importorskip("transformers")
    source = (TEMPLATES | MARKED)[name]
    library = byte_level([END, "<s>", "<|im_start|>", "<|im_end|>"])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, chat_template=source, eos_token=END)
    ours = HuggingFaceTokenizer(library.to_str().encode())
    said = [("ab é ab", "ab ab"), (" ab", "é|ab"), ("a", "日本 ab")]
    messages = [
        {"role": role, "content": text} for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    found = encode(source, {"messages": messages}, ours)
    expected = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    n = len(expected["input_ids"])
    assert found.tokens[:n] == expected["input_ids"] and found.tokens[n:] in ([], [ours.endoftext_id])
    assert (found.weights[:n] > 0).astype(int).tolist() == expected["assistant_masks"]
    assert sum(expected["assistant_masks"]) > 10


def test_a_prompt_is_read_in_training_as_generate_reads_it(encode: Callable[..., Scored]) -> None:
    tokenizer = HuggingFaceTokenizer(byte_level([END, "<s>"]).to_str().encode())
    for source in (*TEMPLATES.values(), PLAIN["plain"]):
        conversation = read_conversation(json.dumps(INPUT))
        with Renderer(Template(source, {"eos_token": END}, "DIR")) as renderer:
            prompt = renderer.render(conversation.messages[:1], add_generation_prompt=True).text
        asked, found = tokenizer.encode_symbols(prompt), encode(source, INPUT, tokenizer)
        assert found.tokens[: len(asked)] == asked
        assert not found.weights[: len(asked)].any() and found.weights[len(asked) :].all()
