"""The equality contract notices: with any one switch set wrong, the comparison of `test_parity.py` fails."""

from dataclasses import replace

import pytest
import torch

from distllm.arch.options import Activation, Placement, QKNorm, RopeStyle
from distllm.testing import parity
from distllm.testing.pairs import TOLERANCE

CONTROLS = [
    ("gpt2", {"activation": Activation.gelu}),
    ("gpt2", {"norm_eps": 1e-6}),
    ("llama", {"rope_style": RopeStyle.interleaved}),
    ("llama", {"rope_theta": 500.0 * 1.001}),
    ("llama", {"rope_scaling": {}}),
    ("llama", {"norm_eps": 1e-6}),
    ("llama", {"activation": Activation.gelu}),
    ("llama", {"qkv_bias": False}),
    ("mistral", {"window": 6}),
    ("mistral", {"window": 8}),
    ("mistral", {"layer_types": ["full"]}),
    ("qwen2", {"qkv_bias": False}),
    ("qwen2", {"window": 6}),
    ("qwen2", {"layer_types": ["window", "window", "full", "full"]}),
    ("qwen3", {"qk_norm": QKNorm.none}),
    ("qwen3", {"qk_norm_after_rope": True}),
    ("qwen3", {"rope_theta": 10010.0}),
    ("qwen3_moe", {"router_renormalise": False}),
    ("qwen3_moe", {"experts_per_token": 1}),
    ("qwen3_moe", {"qk_norm": QKNorm.none}),
    ("gpt_oss", {"attention_sinks": False}),
    ("gpt_oss", {"expert_clamp": 7.0}),
    ("gpt_oss", {"expert_clamp": None}),
    ("gpt_oss", {"expert_alpha": 1.71}),
    ("gpt_oss", {"router_top_first": False, "router_renormalise": False}),
    ("gpt_oss", {"window": 6}),
    ("gpt_oss", {"rope_scaling": {}}),
    ("gemma", {"embedding_scale": 1.0}),
    ("gemma", {"norm_gain_offset": 0.0}),
    ("gemma", {"activation": Activation.gelu}),
    ("gemma2", {"attention_softcap": None}),
    ("gemma2", {"logit_softcap": None}),
    ("gemma2", {"attention_scale": None}),
    ("gemma2", {"window": 8}),
    ("gemma2", {"layer_types": ["full", "window"]}),
    ("gemma2", {"activation": Activation.gelu}),
    ("gemma3_text", {"rope_local_theta": None}),
    ("gemma3_text", {"rope_local_theta": 50.0 * 1.001}),
    ("gemma3_text", {"rope_scaling": {}}),
    ("gemma3_text", {"qk_norm": QKNorm.none}),
    ("gemma3_text", {"window": 6}),
    ("olmo2", {"norm_placement": Placement.pre}),
    ("olmo2", {"qk_norm": QKNorm.none}),
    ("olmo2", {"norm_eps": 1e-6}),
    ("olmo3", {"window": 8}),
    ("olmo3", {"rope_scaling": {}}),
    ("olmo3", {"rope_local_theta": None}),  # local layers would be stretched too
    ("nanochat", {"rope_sign": 1}),
    ("nanochat", {"logit_softcap": None}),
    ("nanochat", {"activation": Activation.relu}),
    ("nanochat", {"embedding_norm": False}),
    ("glm", {"rope_fraction": 1.0}),
    ("glm", {"rope_style": RopeStyle.half}),
    ("glm", {"norm_eps": 1e-6}),
    ("glm4", {"rope_fraction": 1.0}),
    ("glm4", {"norm_placement": Placement.pre}),
    ("bert", {"activation": Activation.gelu_tanh}),
    ("bert", {"norm_eps": 1e-5}),
    ("bert", {"norm_placement": Placement.pre}),
    ("bert", {"head_transform": False}),
    ("roberta", {"position_offset": 1}),
    ("roberta", {"norm_eps": 1e-6}),
    ("modernbert", {"window": 5}),
    ("modernbert", {"window": 7}),
    ("modernbert", {"layer_types": ["window", "window", "full"]}),
    ("modernbert", {"rope_local_theta": None}),
    ("modernbert", {"activation": Activation.gelu_tanh}),
    ("modernbert", {"skip_first_norm": False}),
]


def name_of(case):
    name, changes = case
    return f"{name}-" + "-".join(f"{k}={v}" for k, v in changes.items())


def altered(ours, **changes):
    """Our model with the same tensors and other options."""
    model = type(ours)(replace(ours.options, **changes), ours.head_name).eval()
    state, expected = ours.state_dict(), model.state_dict()
    fitting = {k: v for k, v in state.items() if k in expected}
    for key, value in fitting.items():
        if value.shape != expected[key].shape:  # a shorter table
            fitting[key] = value[: len(expected[key])]
    model.load_state_dict(fitting, strict=False)
    return model


@pytest.mark.parametrize("case", CONTROLS, ids=name_of)
def test_a_wrong_switch_shows(pair, case):
    name, changes = case
    this = pair(name)
    assert all(getattr(this.ours.options, k) != v for k, v in changes.items())
    assert this.logits_error("none", altered(this.ours, **changes)) > 2 * TOLERANCE


def test_the_comparison_itself_is_sound(pair):
    """The same copying, with nothing changed, passes."""
    this = pair("gemma3_text")
    assert this.logits_error("none", altered(this.ours)) <= TOLERANCE


def test_without_gains_the_order_of_norm_and_rotation_is_the_same(pair):
    """The one wrong option that is right: turning changes no length, so a norm without gain may come first or last."""
    this = pair("nanochat")
    other = altered(this.ours, qk_norm_after_rope=False)
    assert this.logits_error("none", other) <= TOLERANCE


@torch.no_grad()
def test_a_forgotten_padding_mask_shows(pair):
    this = pair("bert")
    given = this.inputs("right")
    _, expected = this.logits(given)
    without = this.ours(given["input_ids"]).logits[given["attention_mask"].bool()]
    assert parity.relative_error(without, expected) > 1e-2
