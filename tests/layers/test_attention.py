"""Attention against sums written out one query at a time."""

import math

import pytest
import torch

from distllm.layers import attention as attention_module
from distllm.layers.attention import attention
from distllm.layers.masks import Mask
from distllm.layers.positions import rotary_tables


def by_hand(q, k, v, visible, scale, angles=None):
    """One query and one head at a time; `visible` [batch, seq, kv_seq] bool, `angles` [seq, d_head / 2]."""
    if angles is not None:
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

        def rotated(x):
            low, high = x.chunk(2, dim=-1)
            pairs = torch.complex(low, high) * turn
            return torch.cat((pairs.real, pairs.imag), dim=-1)

        q, k = rotated(q), rotated(k)
    groups = q.shape[2] // k.shape[2]
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                seen = visible[b, i].nonzero()[:, 0]
                dots = torch.stack([(q[b, i, h] * k[b, j, h // groups]).sum() for j in seen])
                weights = (dots * scale).exp() / (dots * scale).exp().sum()
                rows.append((weights[:, None] * v[b, seen, h // groups]).sum(dim=0))
    return torch.stack(rows).view(q.shape)


def case(batch, seq, n_heads, n_kv_heads, d_head, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(batch, seq, n, d_head) for n in (n_heads, n_kv_heads, n_kv_heads, n_heads)]
    q, k, v, grad = (torch.randn(s, dtype=dtype) for s in shapes)
    return [x.requires_grad_() for x in (q, k, v)], grad


def gradients(out, inputs, grad):
    return torch.autograd.grad((out * grad).sum(), inputs)


def additive(visible, dtype=torch.float64):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -1e30)[:, None]


@pytest.mark.parametrize("longest", [0, 1024], ids=["torch", "blocked"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_values_and_gradients_equal_written_out_sums(
    monkeypatch, longest, n_kv_heads, packed, turned
):
    monkeypatch.setattr(attention_module, "_LONGEST_BLOCKED", longest)
    # Small blocks, so that 11 rows make three of them, the last one not full.
    monkeypatch.setattr("distllm.layers.blocked_attention._block_size", lambda seq: 4)
    (q, k, v), grad = case(2, 11, 4, n_kv_heads, 6)
    visible = torch.ones(2, 11, 11, dtype=torch.bool).tril()
    mask = rotary = angles = None
    if packed:
        documents = torch.tensor([[1] * 4 + [2] * 7, [1] * 9 + [2] * 2])
        visible = visible & (documents[:, :, None] == documents[:, None, :])
        mask = additive(visible)
    if turned:
        rotary = rotary_tables(torch.arange(11)[None], 6, 100.0, torch.float64)
        angles = torch.outer(
            torch.arange(11).double(), 100.0 ** -(torch.arange(0, 6, 2).double() / 6)
        )
    expected = by_hand(q, k, v, visible, 0.3, angles)
    got = attention(q, k, v, mask=Mask(True, mask), scale=0.3, rotary=rotary)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    for ours, reference in zip(
        gradients(got, (q, k, v), grad), gradients(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seq", [1, 3])
def test_new_queries_meet_all_earlier_keys(masked, seq):
    (q, k, v), _ = case(3, 7, 4, 2, 8)
    visible = torch.ones(3, 7, 7, dtype=torch.bool).tril()
    if masked:
        visible[1, :, :2] = False
        visible[1, [0, 1], [0, 1]] = True
    expected = by_hand(q, k, v, visible, 0.2)[:, -seq:]
    mask = additive(visible[:, -seq:]) if masked or seq > 1 else None
    got = attention(q[:, -seq:], k, v, mask=Mask(False, mask), scale=0.2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_bfloat16_stays_within_its_rounding():
    (q, k, v), grad = case(2, 130, 4, 2, 16, torch.float32)
    rotary = rotary_tables(torch.arange(130)[None], 16, 1e4, torch.float32)
    exact = attention(q, k, v, mask=Mask(True), scale=0.25, rotary=rotary)
    exact_grads = gradients(exact, (q, k, v), grad)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    half = tuple(t.bfloat16() for t in rotary)
    got = attention(*rounded, mask=Mask(True), scale=0.25, rotary=half)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0, atol=0.03)
    for ours, reference in zip(gradients(got, rounded, grad.bfloat16()), exact_grads, strict=True):
        error = (ours.float() - reference).norm() / reference.norm()
        assert error < 0.02


def test_first_query_sees_itself_only():
    (q, k, v), _ = case(1, 5, 2, 2, 4)
    got = attention(q, k, v, mask=Mask(True), scale=1 / math.sqrt(4))
    torch.testing.assert_close(got[:, 0], v[:, 0])
