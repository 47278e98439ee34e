"""The gated feed-forward layer against its formula, one unit at a time."""

import math

import torch

from distllm.layers.feed_forward import GatedFeedForward


def test_equals_the_formula_unit_by_unit():
    torch.manual_seed(0)
    layer = GatedFeedForward(3, 5).double()
    x = torch.randn(3).double()
    gate, up, down = (p.weight.tolist() for p in (layer.gate_proj, layer.up_proj, layer.down_proj))
    inner = []
    for j in range(5):
        g = sum(gate[j][i] * x[i].item() for i in range(3))
        u = sum(up[j][i] * x[i].item() for i in range(3))
        inner.append(g / (1 + math.exp(-g)) * u)
    expected = [sum(down[o][j] * inner[j] for j in range(5)) for o in range(3)]
    torch.testing.assert_close(layer(x).tolist(), expected, rtol=1e-12, atol=1e-12)
