"""Mixtures: every part gets its share of each epoch, and none of its samples is lost."""

import json
import random
from collections import Counter

import pytest

from distllm.data.datasets import ChatDataset, text_rows
from distllm.data.mixture import MixedSampler, Records, Share, make_sampler, recount
from distllm.data.options import DataOptions, MixPart
from distllm.data.sampler import Sampler
from distllm.data.source import open_source
from distllm.errors import ConfigError, DataError


def write(path, name, count, columns=("prompt", "completion")):
    rows = [{columns[0]: f"{name}{i}", columns[1]: f"answer {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def mixed(*parts, **options):
    options = {"heldout_fraction": 0.0} | options
    return open_source(DataOptions(name="file", mix=list(parts), **options), 0)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (5, 1e-9)])
def test_shares_of_an_epoch(weights, shuffle):
    sampler = MixedSampler([Share(40, weights[0]), Share(160, weights[1])], 3, shuffle)
    assert sampler.num_samples == 200
    for epoch in range(3):
        ids = sampler.indices(epoch * 200, 200)
        first = sum(i < 40 for i in ids)
        assert first == sampler.counts[0] == round(200 * weights[0] / sum(weights))
        assert set(ids) <= set(range(200))
    if weights == (1, 1):
        # 100 of each in an epoch: 2.5 rounds of the small part, 5 epochs for 3.125 of the large.
        seen = Counter(sampler.indices(0, 1000))
        assert {seen[i] for i in range(40)} == {12, 13}
        assert {seen[i] for i in range(40, 200)} == {3, 4}
        assert sum(seen[i] for i in range(40)) == 500


def test_an_epoch_is_mixed_and_a_pure_function_of_the_position():
    shares = [Share(30, 2.0), Share(50, 1.0)]
    whole = MixedSampler(shares, 0).indices(0, 320)
    rng = random.Random(0)
    taken = []
    while len(taken) < 320:
        count = min(rng.randint(0, 200), 320 - len(taken))
        taken += MixedSampler(shares, 0).indices(len(taken), count)
    assert taken == whole
    assert MixedSampler(shares, 1).indices(0, 320) != whole
    in_first = [i < 30 for i in whole[:80]]
    assert 15 < sum(in_first[:40]) < 38  # two thirds of either half, roughly
    assert whole[:80] != whole[80:160]


def test_which_sampler(tmp_path):
    assert type(make_sampler([1, 2], 0)) is Sampler
    records = Records.join([(["a"], 1.0), (["b", "c"], 3.0)])
    assert make_sampler(records, 0).counts == [1, 2]
    assert records.spread(lambda r: [r, r]).shares == (Share(2, 1.0), Share(4, 3.0))
    assert recount(records.shares, [0, 1, 0]) == (Share(0, 1.0), Share(1, 3.0))
    assert Records.join([(["a"], 0.0), (["b"], 0.0)]).shares == ()
    with pytest.raises(DataError, match=r"data\.mix\[1\] holds no sample"):
        MixedSampler([Share(1, 1.0), Share(0, 1.0)], 0)


def test_parts_with_limits_and_columns_of_their_own(tmp_path, tok):
    source = mixed(
        MixPart(path=write(tmp_path / "a.jsonl", "a", 20), weight=3, limit=5),
        MixPart(
            path=write(tmp_path / "b.jsonl", "b", 10, ("ask", "reply")),
            weight=1,
            columns={"prompt": "ask", "completion": "reply"},
        ),
    )
    dialogues = source.dialogues("train")
    names = [d.messages[0]["content"] for d in dialogues]
    assert names == [*(f"a{i}" for i in range(5)), *(f"b{i}" for i in range(10))]
    assert dialogues.shares == (Share(5, 3.0), Share(10, 1.0))
    dataset = ChatDataset(dialogues, tok, 50)
    assert make_sampler(dataset, 0).counts == [11, 4]
    plain = mixed(MixPart(path=str(tmp_path / "a.jsonl")), MixPart(path=str(tmp_path / "a.jsonl")))
    assert len(plain.dialogues("train")) == 40
    assert plain.dialogues("train").shares == ()


def test_held_out_by_content_over_all_parts(tmp_path):
    path = write(tmp_path / "a.jsonl", "q", 100)
    source = mixed(MixPart(path=path, weight=1), MixPart(path=path, weight=1), heldout_fraction=0.2)
    sides = [
        {d.messages[0]["content"] for d in source.dialogues(split)}
        for split in ("train", "heldout")
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 100
    assert sum(s.size for s in source.dialogues("train").shares) == 2 * len(sides[0])
    assert make_sampler(source.dialogues("heldout"), 0).num_samples == 2 * len(sides[1])


def test_parts_of_text_share_no_row(tmp_path, tok):
    for name in "ab":
        texts = [{"text": f"{name} " * 20 + str(i)} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    parts = [MixPart(path=str(tmp_path / f"{n}.jsonl"), weight=w) for n, w in (("a", 1), ("b", 2))]
    rows = text_rows(mixed(*parts), tok, 8, "train")
    assert sum(share.size for share in rows.shares) == len(rows)
    texts = [tok.decode(rows[i].input_ids) for i in range(len(rows))]
    assert all(("a" in t) != ("b" in t) for t in texts)
    assert [rows[i].sample_id for i in range(len(rows))] == list(range(len(rows)))
    assert len(rows.documents()) == 8
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_what_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", "a", 3)
    with pytest.raises(ConfigError, match=r"needs data\.path=FILE .*or else data\.mix"):
        open_source(DataOptions(name="file", path=path, mix=[MixPart(path=path)]), 0)
    with pytest.raises(ConfigError, match=r"weights 1, 0: give every part one above 0, or none"):
        mixed(MixPart(path=path, weight=1), MixPart(path=path))
    with pytest.raises(ConfigError, match="weights 1, -1"):
        mixed(MixPart(path=path, weight=1), MixPart(path=path, weight=-1))
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    other = mixed(MixPart(path=path), MixPart(path=str(tmp_path / "t.jsonl")))
    with pytest.raises(DataError, match=r"mixes .*dialogues \(.*a.jsonl line 1\); documents \(.*t"):
        other.dialogues("train")
    with pytest.raises(DataError, match=r"data\.mix\[0\]\.path=.*gone does not exist"):
        mixed(MixPart(path=str(tmp_path / "gone"))).dialogues("train")
