"""The page shows every number, and examples, right and wrong, as they are."""

import html.parser

from lmjax.evaluate.page import page
from lmjax.evaluate.statistics import of_normal_theory
from lmjax.evaluate.tasks.forms import Answer, Together
from lmjax.evaluate.tasks.prompt import Item, Prompt
from lmjax.evaluate.tasks.results import Result
from lmjax.evaluate.tasks.table import table


def quiz(rights: str) -> Result:
    """Questions with two choices; `rights` says of each whether it was answered right."""
    items = [Item(f"<b>{n}?", ("yes & no", "no"), n % 2, f"part {n % 3}") for n in range(len(rights))]
    scores = [{"acc": (float(right), 1.0), "gold_bpb": (3.0 + n, 2.0)} for n, right in enumerate(map(int, rights))]
    asked = [Prompt(n, item, item.context, " ") for n, item in enumerate(items)]
    answers = [Answer(of, {"logprobs": [-1.5, -2.5 - n], "gold": n % 2}) for n, of in enumerate(scores)]
    return Result(asked, answers, "d1935")


def writing() -> Result:
    asked = [Prompt(0, Item("Once", references=("a <time>",)), "Once", " ")]
    together = Together({"bleu": of_normal_theory(12.5, 1.0, 1)}, ["bleu: nrefs:1"])
    return Result(asked, [Answer({"words": (2.0, 1.0)}, {"text": " upon <a>"})], "d7", together)


class Reader(html.parser.HTMLParser):
    """Raises for tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag != "meta":
            self.open.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href"}, "it needs nothing else"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n" if self.open and self.open[-1] != "style" else ""


def read(text: str) -> str:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader.text


def test_numbers_and_examples() -> None:
    results = {"quiz": quiz("110100"), "own": writing()}
    shown = read(page("runs/x, step 3", results, None))
    for line in table(results):
        for cell in line.split("  "):
            assert cell.strip() in ("", "benchmark") or cell.strip() in shown
    assert "acc: 3 of 6" in shown and "not acc: 3 of 6" in shown and "<b>4?" in shown and "yes & no" in shown
    assert "6 items, digest d1935; a guess is right in 0.5000; always choice 1 in 0.5000." in shown
    assert "acc by category" in shown and "part 2" in shown
    assert "▸  upon <a>" in shown and "people wrote: a <time>" in shown and "bleu: nrefs:1" in shown


def test_two_models_side_by_side() -> None:
    shown = read(page("a; other: b", {"quiz": quiz("110100")}, {"quiz": quiz("100111")}))
    kinds = ["acc, the other acc: 2 of 6", "acc, the other not acc: 1 of 6", "not acc, the other acc: 2 of 6"]
    assert all(kind in shown for kind in kinds) and "McNemar p" in shown and "difference" in shown


def test_examples_are_the_same_for_every_model_and_few() -> None:
    first, second = (read(page("x", {"quiz": quiz(rights * 10)}, None)) for rights in ("110", "111"))
    assert first.count("item ") == 5 + 5 and second.count("item ") == 5
