"""Samples to micro-batches: all of a step's samples, like lengths together."""

import pytest

from distllm.objectives.sft import SFT, SFTOptions
from distllm.optim.constant import Constant
from distllm.optim.options import ScheduleOptions
from distllm.testing.tiny import PAD_ID, chat_examples, single_engine, tiny_decoder
from distllm.train.micro_batches import filling
from distllm.train.options import TrainOptions
from distllm.train.source import SampleSource

EXAMPLES = chat_examples(24)


class Dialogues(list):
    """A data set that tells lengths."""

    def length(self, example):
        return len(example.input_ids)


def steps(dataset, count):
    """Return the micro-batches of the first `count` steps of 8 samples, 2 at a time."""
    options = TrainOptions(global_batch_size=8, micro_batch_size=2, max_steps=count)
    source = SampleSource(
        dataset,
        single_engine(tiny_decoder()),
        SFT(SFTOptions(), pad_id=PAD_ID),
        Constant(ScheduleOptions(), count),
        1e-3,
        options,
        seed=3,
    )
    return [source.next(step)[0][0].micro_batches for step in range(count)]


def ids(micro_batches):
    return [i for batch in micro_batches for i in batch.sample_ids.tolist()]


@pytest.fixture(scope="module")
def both():
    return steps(Dialogues(EXAMPLES), 6), steps(list(EXAMPLES), 6)


def test_a_step_holds_the_samples_it_would_hold_in_any_order(both):
    by_length, as_drawn = both
    assert [sorted(ids(s)) for s in by_length] == [sorted(ids(s)) for s in as_drawn]
    assert [ids(s) for s in by_length] != [ids(s) for s in as_drawn]


def test_like_lengths_go_together_the_longest_first(both):
    for step in both[0]:
        lengths = [len(EXAMPLES[i].input_ids) for i in ids(step)]
        assert lengths == sorted(lengths, reverse=True)
        assert [len(batch.input_ids) for batch in step] == [2, 2, 2, 2]


def test_fewer_places_are_padding(both):
    places, filled = zip(
        *(
            map(sum, zip(*((filling(b)[:2]) for step in side for b in step), strict=True))
            for side in both
        ),
        strict=True,
    )
    assert filled[0] == filled[1]
    assert places[0] < places[1]
