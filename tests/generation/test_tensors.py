"""The tensor form against transformers' own `generate`, ends, padding and all."""

import torch
from test_generate import llama  # noqa: F401  (a fixture)

from distllm.generation.tensors import generate


def test_equals_transformers(llama):  # noqa: F811
    theirs, mine = llama
    noise = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 128, (8, 10), generator=noise)
    mask = torch.arange(10) >= torch.arange(8)[:, None]
    ids = ids.masked_fill(~mask, 0)
    free = theirs.generate(ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=30)
    end_ids = free[:, 15:18].flatten().unique().tolist()
    settings = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=mask.long(), eos_token_id=end_ids, **settings)
    found = generate(mine, ids, mask, temperature=0.0, max_new_tokens=30, end_ids=end_ids, pad_id=0)
    assert found.shape[1] < 40, "some response must end for this to show anything"
    assert torch.equal(found, expected)


def test_samples_stand_next_to_each_other(llama):  # noqa: F811
    _, mine = llama
    ids = torch.tensor([[3, 4], [9, 8]])
    many = generate(mine, ids, num_samples=3, max_new_tokens=5, seed=7)
    assert many.shape == (6, 7)
    assert many[:, :2].tolist() == [[3, 4]] * 3 + [[9, 8]] * 3
    one = generate(mine, ids, max_new_tokens=5, seed=7)
    assert torch.equal(many[::3], one)
    assert not torch.equal(one, generate(mine, ids, max_new_tokens=5, seed=8))
