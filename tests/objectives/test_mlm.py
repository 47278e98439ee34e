"""Masked language modelling against the papers' shares."""

import numpy as np
import pytest
from patched import with_bug

from distllm.objectives import mlm as mlm_module
from distllm.objectives.mlm import MLM
from distllm.objectives.noise import generator
from distllm.types import IGNORE_INDEX


def counted(objective, num_rows=200, length=500):
    """Corrupt random texts; return the shares of chosen, and of masked, swapped and kept among them."""
    plain = objective.vocabulary.plain_ids
    chosen = masked = kept = total = 0
    for row in range(num_rows):
        ids = generator(1, row).choice(plain, length)
        new, places = objective.corrupt(ids, generator(2, row))
        others = np.setdiff1d(np.arange(length), places)
        assert (new[others] == ids[others]).all()
        assert not set(new.tolist()) - set(plain.tolist()) - {objective.vocabulary.mask_id}
        total += length
        chosen += len(places)
        masked += int((new[places] == objective.vocabulary.mask_id).sum())
        kept += int((new[places] == ids[places]).sum())
    return np.array([chosen / total, masked / chosen, kept / chosen])


def expected(objective, rate):
    """A random token is the right one once in so many draws."""
    lucky = 0.1 / len(objective.vocabulary.plain_ids)
    return np.array([rate, 0.8, 0.1 + lucky])


def test_bert_chooses_15_percent_and_splits_80_10_10(build):
    objective = build(MLM)
    found, want = counted(objective), expected(objective, 0.15)
    assert found[0] == 0.15
    assert (np.abs(found - want) < 4 * np.sqrt(want * (1 - want) / 15000)).all()


def test_modernbert_chooses_30_percent_and_15_in_evaluation(build):
    assert counted(build(MLM, mask_rate=0.3), 20)[0] == 0.3
    assert counted(build(MLM, mask_rate=0.3, evaluating=True), 20)[0] == 0.15


def test_the_shares_would_notice_a_wrong_split(build):
    wrong = with_bug(mlm_module, "fate < options.mask_token_share + options.random_token_share", "fate < 0.95")  # fmt: skip
    found, want = counted(build(wrong.MLM)), expected(build(MLM), 0.15)
    assert (np.abs(found - want) > 4 * np.sqrt(want * (1 - want) / 15000)).any()


def test_whole_words_are_hidden_whole(build, tok):
    objective = build(MLM, mask_whole_words=True)
    text = "The unquestionable fox jumps over twelve international dikes and every boxer answers. "
    ids = np.array(tok(text * 6, add_special_tokens=False)["input_ids"])
    starts = objective.vocabulary.word_starts(ids)
    word = np.searchsorted(starts, np.arange(len(ids)), "right")
    shares = []
    for visit in range(50):
        _, places = objective.corrupt(ids, generator(visit))
        hit = set(word[places].tolist())
        assert places.tolist() == [i for i in range(len(ids)) if word[i] in hit]
        shares.append(len(places) / len(ids))
    assert max(shares) <= 0.15 + 1 / len(ids) and np.mean(shares) > 0.14
    longest = np.diff(starts, append=len(ids)).max()
    assert longest > 2
    _, places = build(MLM).corrupt(ids, generator(0))
    assert any(set(places) < {i for i in range(len(ids)) if word[i] == word[p]} | set(places) for p in places)  # fmt: skip


def test_a_batch_holds_what_was_there(build):
    objective = build(MLM, seq_len=64)
    documents = [generator(i).integers(6, 260, 3 + 19 * i).tolist() for i in range(9)]
    rows = objective.dataset(documents)
    batch = objective.collate([rows[i] for i in range(len(rows))])
    assert batch.input_ids.shape == (len(rows), 64)
    text = batch.input_ids.where(batch.labels == IGNORE_INDEX, batch.labels)
    read = []
    for r in range(len(rows)):
        for number in range(1, int(batch.segment_ids[r].max()) + 1):
            first, *piece, last = text[r][batch.segment_ids[r] == number].tolist()
            assert [first] == objective.vocabulary.opening
            assert [last] == objective.vocabulary.closing
            read += piece
    assert read == [t for d in documents for t in d]


@pytest.mark.parametrize("cls", ["mlm", "span", "ul2", "blank"])
def test_noise_belongs_to_seed_sample_and_visit(build, cls):
    """So that a run which is resumed, or cut into other micro-batches, meets the same texts."""
    from distllm import registry

    cls = registry.get("objective", cls)
    documents = [generator(i).integers(6, 260, 70).tolist() for i in range(8)]
    rows = build(cls, 64).dataset(documents)

    def ids(indices, visit=0, **how):
        batch = build(cls, 64, **how).collate([rows.draw(i, visit) for i in indices])
        extra = batch.labels if batch.decoder_input_ids is None else batch.decoder_input_ids
        return [(*batch.input_ids[r].tolist(), *extra[r].tolist()) for r in range(len(indices))]

    both = ids([0, 3])
    assert both == ids([0, 3]) == [ids([0])[0], ids([3])[0]]
    for other in (ids([0, 3], visit=1), ids([0, 3], seed=1), ids([0, 3], evaluating=True)):
        assert other != both
    assert ids([0], visit=1) == ids([0], visit=1)
    assert ids([0], evaluating=True, visit=1) == ids([0], evaluating=True)
