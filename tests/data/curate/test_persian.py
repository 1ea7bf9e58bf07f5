"""The recipe for Persian on five classical poets: verse stays, joiners stay, Arabic letters become Persian ones."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from lmjax import config
from lmjax.data.config import PrepareConfig, TokenizerConfig
from lmjax.data.curate.clean import ZWNJ
from lmjax.data.curate.curate import curate
from lmjax.data.curate.recipe import CurateConfig
from lmjax.data.prepare.prepare import prepare
from lmjax.data.store.dataset import open_dataset
from lmjax.schema import validated

RECIPE = Path(__file__).parents[3] / "configs" / "curate" / "persian.py"
ARABIC = str.maketrans({"ی": "ي", "ک": "ك"})


def texts_of(directory: Path) -> Iterator[str]:
    for path in sorted(directory.glob("*.jsonl.zst")):
        lines = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().decode().splitlines()
        yield from (json.loads(line)["text"] for line in lines)


def test_the_poets_come_through_whole(tmp_path: Path, persian: list[str]) -> None:
    """As an Arabic keyboard types them, plurals and verbs joined as is usual today, a joiner too many at line ends;
    and what is prepared of them decodes to the same text."""
    for package in ("ftfy", "py3langid", "rensa"):
        pytest.importorskip(package)
    lines = [line for text in persian for line in text.splitlines()[2:402]]
    verses = ["\n".join(lines[start : start + 20]) for start in range(0, len(lines), 20)]
    joined = [re.sub(r"(?<=\w) (?=ها\b)|(?<=\bمی) (?=\w)", ZWNJ, verse).strip() for verse in verses]
    typed = [text.translate(ARABIC).replace("\n", f"{ZWNJ}\n") for text in joined]
    source = tmp_path / "poets.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in typed))
    cfg = validated(CurateConfig, config.ConfigFile(f"{RECIPE}:{source}").tree().to_dict() | {"workers": 1})
    curation = curate(cfg, tmp_path / "out", progress=False)
    kept = {account.step: account.kept[0] for account in curation.steps}
    assert kept["language"] >= 0.97 * kept["read"] == 0.97 * len(verses)
    texts = [*texts_of(tmp_path / "out")]
    assert set(texts) <= set(joined) and len(texts) == kept["near_duplicates"] >= 0.95 * len(verses)
    assert sum(text.count(ZWNJ) for text in texts) > 20 and not set("".join(texts)) & set("يك")
    recipe = PrepareConfig(
        inputs=(str(tmp_path / "out"),), tokenizer=TokenizerConfig(kind="unigram", vocab=700), workers=1
    )
    manifest = prepare(recipe, tmp_path / "data", progress=False)
    assert sum(split.inexact_documents for split in manifest.splits.values()) == 0
    dataset = open_dataset(tmp_path / "data")
    splits = [dataset.split(name) for name in manifest.splits]  # type: ignore[arg-type]
    assert {dataset.tokenizer().decode(ids) for split in splits for ids in split.documents()} == set(texts)
