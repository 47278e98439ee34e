"""Positions and attention bias against rules applied one pair of tokens at a time."""

from types import SimpleNamespace

import pytest
import torch

from distllm.layers.masks import lay_out


def layout(shape, attention_mask=None, position_ids=None, segment_ids=None, past=0, columns=None):
    found = lay_out(
        shape,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        past=past,
        columns=columns,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return SimpleNamespace(position_ids=found.position_ids, bias=found.masks[None].bias)


def mask(*rows):
    return torch.tensor(rows).bool()


def sees(result, row, query, key):
    return bool(result.bias[row, 0, query, key] == 0)


def test_no_padding_needs_no_bias():
    result = layout((2, 5))
    assert result.bias is None
    assert result.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert layout((2, 5), mask([1] * 5, [1] * 5)).bias is None


def test_right_padding_needs_no_bias():
    result = layout((2, 4), mask([1, 1, 1, 0], [1, 0, 0, 0]))
    assert result.bias is None
    assert result.position_ids.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("rows", [([0, 0, 1, 1], [1, 1, 1, 1]), ([1, 0, 1, 1], [1, 1, 1, 1])])
def test_other_padding_hides_the_pads(rows):
    result = layout((2, 4), mask(*rows))
    for row, real in enumerate(rows):
        count = 0
        for query in range(4):
            if not real[query]:
                continue
            assert result.position_ids[row, query] == count
            count += 1
            for key in range(4):
                assert sees(result, row, query, key) == (key <= query and bool(real[key]))


def test_padded_queries_still_see_something():
    result = layout((1, 4), mask([0, 0, 1, 1]))
    assert all(sees(result, 0, query, query) for query in range(4))
    assert result.bias.isfinite().all()


def test_segments_restart_positions_and_hide_each_other():
    segments = torch.tensor([[3, 3, 5, 5, 5, 0], [1, 1, 1, 1, 1, 1]])
    result = layout((2, 6), segment_ids=segments)
    assert result.position_ids.tolist()[0][:5] == [0, 1, 0, 1, 2]
    assert result.position_ids.tolist()[1] == [0, 1, 2, 3, 4, 5]
    for row in range(2):
        for query in range(6):
            for key in range(6):
                same = segments[row, query] == segments[row, key]
                assert sees(result, row, query, key) == bool(same and key <= query)


def test_a_mask_hides_tokens_inside_their_segment_too():
    segments = torch.tensor([[1, 1, 1, 2, 2]])
    result = layout((1, 5), mask([1, 0, 1, 1, 0]), segment_ids=segments)
    assert [sees(result, 0, 2, key) for key in range(5)] == [True, False, True, False, False]
    assert [sees(result, 0, 3, key) for key in range(5)] == [False, False, False, True, False]


def test_equal_ids_that_do_not_touch_are_positions_of_their_own():
    result = layout((1, 5), segment_ids=torch.tensor([[1, 1, 2, 1, 1]]))
    assert result.position_ids.tolist() == [[0, 1, 0, 0, 1]]


def test_cached_columns_count():
    result = layout((2, 1), mask([0, 1, 1, 1], [1, 1, 1, 1]), past=3)
    assert result.position_ids.tolist() == [[2], [3]]
    assert result.bias[:, 0, 0].eq(0).tolist() == [[False, True, True, True], [True] * 4]
    assert (layout((2, 1), mask([1] * 4, [1] * 4), past=3).bias == 0).all()
    several = layout((1, 2), past=3)
    assert several.position_ids.tolist() == [[3, 4]]
    assert several.bias[0, 0].eq(0).tolist() == [[True] * 4 + [False], [True] * 5]


def test_columns_that_are_not_written_yet_are_hidden():
    plain = layout((2, 1), past=3, columns=6)
    padded = layout((2, 1), mask([0, 1, 1, 1], [1, 1, 1, 1]), past=3, columns=6)
    assert plain.bias[0, 0].eq(0).tolist() == [[True] * 4 + [False] * 2]
    assert padded.bias[:, 0, 0].eq(0).tolist() == [
        [False, True, True, True, False, False],
        [True, True, True, True, False, False],
    ]


def test_given_positions_are_kept():
    given = torch.tensor([[7, 8, 9]])
    assert layout((1, 3), position_ids=given).position_ids is given


def test_a_mask_of_the_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"shape \[1, 3\].*\[1, 2 \+ 3\]"):
        layout((1, 3), mask([1, 1, 1]), past=2)


def test_packed_rows_cannot_be_continued():
    with pytest.raises(ValueError, match="segment_ids"):
        layout((1, 1), segment_ids=torch.ones(1, 1, dtype=torch.long), past=4)
