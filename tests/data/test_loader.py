"""The loader: sample g is what it is, whoever asks, in whatever batch, after whatever interruption."""

import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pytest

from lmjax.data.config import DataConfig, SourceConfig, TokenizerConfig
from lmjax.data.loader import Loader
from lmjax.errors import ConfigError, DataError


@pytest.fixture
def two_sources(prepared, numbered_texts):
    """A mixture of two data sets of different size, 3 to 1."""
    paths = {"a": prepared(numbered_texts, name="a"), "b": prepared(numbered_texts[:50], name="b")}
    return {
        "a": SourceConfig(path=str(paths["a"]), weight=3.0),
        "b": SourceConfig(path=str(paths["b"]), weight=1.0),
    }


@pytest.fixture(params=["joined", "separate"])
def cfg(two_sources, request):
    return DataConfig(sources=two_sources, seq_len=32, documents=request.param)


def arrays(batch):
    return {name: value for name, value in vars(batch).items() if value is not None}


def concatenated(batches):
    parts = [arrays(batch) for batch in batches]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.array_equal(value, second[name]) and value.dtype == second[name].dtype


def take(loader, n):
    return concatenated(itertools.islice(loader, n))


def test_the_stream_does_not_depend_on_batch_size_or_prefetch(cfg):
    expected = take(Loader(cfg, batch_size=1), 240)
    assert expected["ids_B"].tolist() == list(range(240))
    for batch_size, prefetch in ((8, 0), (24, 1), (120, 3)):
        loader = Loader(dataclasses.replace(cfg, prefetch=prefetch), batch_size=batch_size)
        assert_equal(take(loader, 240 // batch_size), expected)


GOLDEN = {"joined": "79407b3b1eaba913", "separate": "9f418b7334875eb3"}


def test_the_stream_is_what_it_always_was(cfg):
    """Over several epochs of both sources: runs that were begun by earlier versions go on with the same samples."""
    batches = Loader(cfg, batch_size=8).batches(100, 250)
    content = b"".join(x.tobytes() for batch in batches for x in arrays(batch).values())
    assert hashlib.sha256(content).hexdigest()[:16] == GOLDEN[cfg.documents]


def test_resuming_at_any_sample_is_never_having_stopped(cfg):
    loader = Loader(cfg, batch_size=1)
    expected = take(loader, 3000)  # several epochs of both
    assert loader.epoch(3000)["b"] > 2
    for sample, batch_size in ((1, 5), (777, 7), (1999, 13), (2500, 100)):
        state = json.loads(json.dumps(loader.state(sample)))
        resumed = Loader(cfg, batch_size=batch_size, at=state)
        found = take(resumed, 500 // batch_size)
        n = len(found["ids_B"])
        assert_equal(found, {name: value[sample : sample + n] for name, value in expected.items()})
        assert resumed.fingerprint == loader.fingerprint
        assert resumed.state(sample + n) == loader.state(sample + n)


def test_rows_of_all_processes_make_the_global_batch(cfg):
    expected = take(Loader(cfg, batch_size=12), 20)
    for n in (2, 3, 4):
        parts = [Loader(cfg, batch_size=12, rows=np.arange(12 * i // n, 12 * (i + 1) // n)) for i in range(n)]
        batches = [concatenated(rows) for rows in itertools.islice(zip(*parts, strict=True), 20)]
        assert_equal({name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}, expected)


def test_each_source_is_read_once_an_epoch_and_in_proportion(two_sources):
    cfg = DataConfig(sources=two_sources, seq_len=32)
    loader = Loader(cfg, batch_size=16)
    alone = {
        name: Loader(DataConfig(sources={name: source}, seq_len=32), batch_size=1)
        for name, source in two_sources.items()
    }
    mixed = take(loader, 100)["tokens_BT"].tolist()
    expected = {name: iter(take(single, 1300)["tokens_BT"].tolist()) for name, single in alone.items()}
    order = loader._mixture.locate(np.arange(1600))[0]
    assert abs((order == 0).sum() - 1200) <= 1
    assert all(row == next(expected["ab"[source]]) for row, source in zip(mixed, order, strict=True))
    assert loader.epoch(1600) == {
        name: pytest.approx(share * 1600 / alone[name]._sources[0].per_epoch)
        for name, share in (("a", 0.75), ("b", 0.25))
    }


def test_another_stream_is_refused_by_name(cfg, two_sources):
    state = Loader(cfg, batch_size=4).state(100)
    swapped = {"a": two_sources["b"], "b": two_sources["a"]}
    other_documents = "separate" if cfg.documents == "joined" else "joined"
    changes = [
        {"seed": 1},
        {"seq_len": 31},
        {"documents": other_documents},
        {"sources": swapped},
        {"sources": {"a": two_sources["a"]}},
        {"sources": two_sources | {"c": two_sources["a"]}},
        {"sources": two_sources | {"a": dataclasses.replace(two_sources["a"], weight=2.0)}},
    ]
    for change in changes:
        changed = dataclasses.replace(cfg, **change)
        with pytest.raises(DataError, match=r"fingerprint [0-9a-f]{16} now, [0-9a-f]{16} then.*--allow-data-change"):
            Loader(changed, batch_size=4, at=state)
        loader = Loader(changed, batch_size=4, at=state, allow_data_change=True)
        assert loader.fingerprint != state["fingerprint"] and next(iter(loader)).ids_B[0] == 100
    Loader(dataclasses.replace(cfg, prefetch=0, verify="full"), batch_size=9, at=state)
    reordered = dict(reversed(two_sources.items()))
    Loader(dataclasses.replace(cfg, sources=reordered), batch_size=9, at=state)


def test_a_changed_mixture_carries_on_where_its_sources_were(cfg, two_sources, prepared, numbered_texts):
    old = Loader(cfg, batch_size=8)
    state = old.state(400)
    third = SourceConfig(path=str(prepared(numbered_texts[:30], name="c")), weight=4.0)
    changed = dataclasses.replace(cfg, sources=two_sources | {"c": third})
    loader = Loader(changed, batch_size=8, at=state, allow_data_change=True)
    cursors = {name: position["cursor"] for name, position in loader.state(400)["sources"].items()}
    assert cursors == {"a": 300, "b": 100, "c": 0}
    assert {name: position["cursor"] for name, position in loader.state(480)["sources"].items()} == {
        "a": 330, "b": 110, "c": 40,
    }  # fmt: skip
    # And this run, too, resumes exactly.
    expected = take(loader, 60)
    resumed = Loader(changed, batch_size=5, at=loader.state(403))
    assert_equal(take(resumed, 40), {name: value[3:203] for name, value in expected.items()})
    with pytest.raises(DataError, match="--allow-data-change"):
        Loader(cfg, batch_size=8, at=loader.state(480))


def test_a_source_that_comes_back_goes_on_where_it_was(cfg, two_sources, caplog):
    state = Loader(cfg, batch_size=8).state(400)
    alone = dataclasses.replace(cfg, sources={"a": two_sources["a"]})
    without = Loader(alone, batch_size=8, at=state, allow_data_change=True)
    state = json.loads(json.dumps(without.state(500)))
    back = Loader(cfg, batch_size=8, at=state, allow_data_change=True)
    assert {name: p["cursor"] for name, p in back.state(500)["sources"].items()} == {"a": 400, "b": 100}
    assert not caplog.records
    other = dataclasses.replace(cfg, sources=two_sources | {"b": two_sources["a"]})  # not what it was
    fresh = Loader(other, batch_size=8, at=state, allow_data_change=True)
    assert fresh.state(500)["sources"]["b"]["cursor"] == 0
    assert "data.sources.b is not what it was" in caplog.text


def test_a_mixture_keeps_its_resolution(cfg, two_sources):
    """What was rounded to 2^16 shares by an earlier version stays so; a finer one says so in its state."""
    weights = {"a": 1.0, "b": 1e-5 / 3}
    sources = {n: dataclasses.replace(s, weight=weights[n]) for n, s in two_sources.items()}
    fine = Loader(dataclasses.replace(cfg, sources=sources), batch_size=8)
    state = fine.state(100)
    assert state["origin"]["resolution"] == 1 << 20
    assert Loader(fine._cfg, batch_size=8, at=state).fingerprint == fine.fingerprint
    earlier = {"sample": 0, "cursors": {"a": 0, "b": 0}}
    state = {**state, "origin": earlier, "fingerprint": fine._fingerprint(earlier)}
    assert Loader(fine._cfg, batch_size=8, at=state)._mixture.period == 1 << 16
    assert "resolution" not in Loader(cfg, batch_size=8).state(1)["origin"]


def test_damage_found_in_the_background_comes_out_as_our_error(two_sources):
    cfg = DataConfig(sources={"a": two_sources["a"]}, seq_len=32, prefetch=4)
    loader = Loader(cfg, batch_size=8)
    path = loader._sources[0].samples._split.shards[0].path
    content = path.read_bytes()
    path.write_bytes(b"\1" + content[1:])  # the same size, so opening finds nothing
    with pytest.raises(DataError, match=r"train-00000.tokens: .* are damaged"):
        list(itertools.islice(Loader(cfg, batch_size=8), 400))
    with pytest.raises(DataError, match="is damaged"):
        Loader(dataclasses.replace(cfg, verify="full"), batch_size=8)


def test_mixtures_need_sources_and_one_tokenizer(two_sources, prepared):
    with pytest.raises(ConfigError, match=r"data.sources is empty"):
        Loader(DataConfig(), batch_size=1)
    other = SourceConfig(path=str(prepared(["abc" * 99], name="other", tokenizer=TokenizerConfig(kind="chars"))))
    with pytest.raises(DataError, match=r"data.sources.b and data.sources.a were prepared with different tokenizers"):
        Loader(DataConfig(sources={"a": two_sources["a"], "b": other}), batch_size=1)


def test_a_loader_can_be_iterated_again_and_abandoned(two_sources):
    loader = Loader(DataConfig(sources=two_sources, seq_len=32), batch_size=4)
    first = take(loader, 3)
    for _ in range(5):
        assert_equal(take(loader, 3), first)
