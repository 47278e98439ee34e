"""Experts against a loop over tokens, their losses against transformers' and against any split of the batch."""

import pytest
import torch
import torch.nn.functional as F

from distllm.layers.experts import (
    Experts,
    Router,
    balance_loss,
    pooled_balance_loss,
    router_z_loss,
)


def layer(top_first=False, renormalise=True, clamp=None, bias=False, dtype=torch.float64, inner=6):
    router = Router(8, 5, 2, top_first=top_first, renormalise=renormalise, bias=bias)
    experts = Experts(8, inner, 5, router, activation="silu", clamp=clamp, bias=bias).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


def by_hand(experts, token, top_first, renormalise, clamp):
    """One token, in words of the definition."""
    router = experts.router
    scores = router.weight @ token + (0 if router.bias is None else router.bias)
    ranked = sorted(range(5), key=lambda e: -scores[e])[:2]
    if top_first:
        weights = torch.softmax(scores[ranked], dim=0)
    else:
        weights = torch.softmax(scores, dim=0)[ranked]
        weights = weights / weights.sum() if renormalise else weights
    out = torch.zeros_like(token)
    for weight, e in zip(weights, ranked, strict=True):
        inner = experts.gate_up_proj[e] @ token
        inner = inner + (0 if experts.gate_up_bias is None else experts.gate_up_bias[e])
        gate, up = inner[:6], inner[6:]
        if clamp is None:
            mixed = F.silu(gate) * up
        else:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
            mixed = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        made = experts.down_proj[e] @ mixed
        out = out + weight * (made + (0 if experts.down_bias is None else experts.down_bias[e]))
    return out


WAYS = [
    {},
    {"renormalise": False},
    {"top_first": True, "clamp": 0.7, "bias": True},
]


@pytest.mark.parametrize("way", WAYS)
def test_equals_a_loop_over_tokens(way):
    experts = layer(**way)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    settings = {"top_first": False, "renormalise": True, "clamp": None} | way
    settings.pop("bias", None)
    expected = torch.stack([by_hand(experts, t, **settings) for t in x.flatten(0, 1)]).view_as(x)
    got, _ = experts(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    inputs = [x, *experts.parameters()]
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, grad, retain_graph=True),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_an_expert_that_nobody_chose_gets_a_gradient_of_zero():
    experts = layer(bias=True)
    with torch.no_grad():
        experts.router.bias[3] = -1e4
    experts(torch.randn(1, 4, 8, dtype=torch.float64))[0].sum().backward()
    assert (experts.gate_up_proj.grad[3] == 0).all()
    assert (experts.gate_up_proj.grad[[0, 1, 2, 4]] != 0).any()


def test_the_pool_equals_transformers():
    module = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    scores = [torch.randn(3, 9, 5) for _ in range(4)]
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 4:] = False
    flat = tuple(s.flatten(0, 1) for s in scores)
    for mask in (None, real):
        expected = module.load_balancing_loss_func(
            flat, 5, 2, None if mask is None else mask.long()
        )
        torch.testing.assert_close(pooled_balance_loss(scores, 2, mask), expected)


def test_losses_do_not_depend_on_the_split_of_a_batch():
    scores = torch.randn(4, 9, 5, dtype=torch.float64)
    chosen = scores.topk(2, dim=-1).indices
    real = torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]
    whole = balance_loss(scores, chosen, real), router_z_loss(scores, real)
    for row in range(4):
        length = int(real[row].sum())
        alone = scores[row : row + 1, :length], chosen[row : row + 1, :length]
        torch.testing.assert_close(whole[0][row], balance_loss(*alone, None)[0])
        torch.testing.assert_close(whole[1][row], router_z_loss(alone[0], None)[0])
    assert balance_loss(scores, chosen, torch.zeros_like(real)).tolist() == [0.0] * 4


def test_even_routing_costs_least():
    even = torch.eye(4, dtype=torch.float64)[None] * 3
    assert balance_loss(even, even.topk(1).indices, None).item() == pytest.approx(1.0)
    lopsided = torch.zeros(1, 4, 4, dtype=torch.float64)
    lopsided[..., 0] = 9.0
    assert balance_loss(lopsided, lopsided.topk(1).indices, None).item() > 3.9


def test_router_z_is_the_squared_normaliser():
    scores = torch.tensor([[[0.0, 1.0], [2.0, 2.0]]], dtype=torch.float64)
    expected = (scores.exp().sum(dim=-1).log() ** 2).mean()
    assert router_z_loss(scores, None).item() == pytest.approx(expected.item())


def test_losses_come_in_training_only():
    experts, x = layer(), torch.randn(1, 4, 8, dtype=torch.float64)
    assert set(experts(x)[1]) == {"balance", "router_z"}
    assert experts.eval()(x)[1] == {}


@pytest.mark.parametrize("way", WAYS)
def test_grouped_products_give_the_same(way):
    """The path that GPUs take, here in bfloat16 on whatever there is."""
    experts = layer(**way, dtype=torch.float32, inner=16)
    x = torch.randn(24, 8)
    chosen = experts.router(x)[2]
    order = chosen.flatten().argsort(stable=True)
    given = x.index_select(0, order // 2)
    sizes = torch.bincount(chosen.flatten(), minlength=5).tolist()
    expected = experts._one_by_one(given, sizes)
    got = experts._grouped(given.bfloat16(), chosen)
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_mxfp4_unpacks_as_transformers_does():
    module = pytest.importorskip("transformers.integrations.mxfp4")
    from distllm.arch.hf.mxfp4 import unpack, unpack_all

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 135, (3, 10, 2), dtype=torch.uint8, generator=generator)
    expected = module.convert_moe_packed_tensors(blocks, scales)
    got = unpack(blocks, scales)
    assert got.shape == (3, 64, 10) and torch.equal(got, expected)
    named = unpack_all({"a.down_proj_blocks": blocks, "a.down_proj_scales": scales, "b": scales})
    assert set(named) == {"a.down_proj", "b"} and torch.equal(named["a.down_proj"], expected)
