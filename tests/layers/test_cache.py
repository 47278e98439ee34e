"""The key/value cache as a container; that decoding through it is right is tested with the model."""

import pytest
import torch

from distllm.layers.cache import KVCache


def filled(batch=3, columns=2):
    cache = KVCache(2, batch, 2, 5, 4, torch.float32, "cpu")
    k = torch.arange(batch * columns * 8.0).view(batch, columns, 2, 4)
    for layer in range(2):
        cache.append(layer, k + 1000 * layer, -k - 1000 * layer)
    cache.advance(columns)
    return cache, k


def test_append_returns_all_columns():
    cache, k = filled()
    new = torch.full((3, 1, 2, 4), 7.0)
    keys, values = cache.append(1, new, 2 * new)
    assert keys.shape == values.shape == (3, 5, 2, 4)
    assert torch.equal(keys[:, :3], torch.cat((k + 1000, new), dim=1))
    assert torch.equal(values[:, :3], torch.cat((-k - 1000, 2 * new), dim=1))
    assert keys.isfinite().all()
    assert values.isfinite().all()
    assert cache.length == 2


def test_select_keeps_rows_in_order():
    cache, k = filled()
    assert cache.select(torch.tensor([2, 0])) is cache
    keys, _ = cache.append(0, torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4))
    assert torch.equal(keys[:, :2], k[[2, 0]])
    assert cache.batch_size == 2


def test_repeat_puts_copies_side_by_side():
    cache, k = filled(batch=2)
    cache.repeat(3)
    keys, _ = cache.append(0, torch.zeros(6, 1, 2, 4), torch.zeros(6, 1, 2, 4))
    assert torch.equal(keys[:, :2], k[[0, 0, 0, 1, 1, 1]])


def test_a_full_cache_says_so():
    cache, _ = filled()
    with pytest.raises(ValueError, match="room for 5 tokens; 2 are in it and 4 more"):
        cache.append(0, torch.zeros(3, 4, 2, 4), torch.zeros(3, 4, 2, 4))


def test_other_rows_are_refused():
    cache, _ = filled()
    with pytest.raises(ValueError, match="3 rows, the input has 2"):
        cache.append(0, torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4))
