"""Initial weights depend on (seed, name) and on nothing else."""

import hashlib

import pytest
import torch
from torch import nn

from distllm.layers.init import init_parameters, initial_value

RULES = {"*norm.weight": ("constant", 1.0), "*.out.weight": ("normal", 0.1), "*": ("normal", 2.0)}


class Net(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 4, bias=False))

    def init_rules(self):
        return RULES


def test_order_and_company_do_not_matter():
    one, two = Net(["a", "b", "c"]), Net(["c", "a"])
    torch.manual_seed(1)
    init_parameters(one, 7)
    torch.manual_seed(2)
    init_parameters(two, 7)
    assert torch.equal(one.a.weight, two.a.weight)
    assert torch.equal(one.c.weight, two.c.weight)
    assert not torch.equal(one.a.weight, one.b.weight)


def test_another_seed_gives_other_weights():
    shape = torch.Size([6, 4])
    draws = {tuple(initial_value(RULES, "a.weight", shape, s).flatten().tolist()) for s in range(5)}
    assert len(draws) == 5


def test_the_global_generator_is_left_alone():
    net = Net(["a"])
    before = torch.get_rng_state()
    init_parameters(net, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "std"), [("x.out.weight", 0.1), ("x.weight", 2.0)])
def test_the_first_rule_that_matches_applies(name, std):
    draw = initial_value(RULES, name, torch.Size([300, 300]), 0)
    assert abs(draw.std().item() / std - 1) < 0.02
    assert abs(draw.mean().item()) < 0.02 * std


def test_constants():
    assert initial_value(RULES, "a.norm.weight", torch.Size([3]), 0).tolist() == [1.0, 1.0, 1.0]


def test_an_unmatched_parameter_is_named():
    with pytest.raises(ValueError, match=r"odd\.bias"):
        initial_value({"*.weight": ("normal", 1.0)}, "odd.bias", torch.Size([1]), 0)


def test_draws_do_not_change_between_versions():
    """The same seed must mean the same model for ever: pinned through the generator's definition."""
    digest = hashlib.sha256(b"5/a.weight").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    expected = torch.empty(3, 2).normal_(0.0, 2.0, generator=generator)
    assert torch.equal(initial_value(RULES, "a.weight", torch.Size([3, 2]), 5), expected)
