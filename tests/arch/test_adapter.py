"""Adapters against peft's own run on the same model in transformers: logits, gradients, the merged file byte for byte."""

import numpy as np
import pytest
import torch
from patched import planted

from distllm.arch import adapter
from distllm.arch.adapter import AdapterOptions, attach, merged, switched_off
from distllm.arch.hf.family import families
from distllm.arch.hf.rules import their_names
from distllm.arch.io import load_model, save_model
from distllm.errors import ConfigError
from distllm.testing import parity

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

OPTIONS = AdapterOptions(name="lora", rank=3, alpha=5.0)
FAMILIES = ("llama", "qwen2", "t5", "bart", "bert")
TOLERANCE = 1e-5


class Twins:
    """One set of weights and one adapter in two implementations: ours, and transformers' model under peft."""

    def __init__(self, model_type, folder, options=OPTIONS):
        family = families()[model_type]
        theirs = parity.reference(family)
        self.folder = parity.save(theirs, folder / "base")
        self.ours, _ = load_model(self.folder)
        names = their_names(family.rules(self.ours.options, "lm"))
        self.names = {
            path: names[f"{path}.weight"][0].removesuffix(".weight")
            for path in adapter.target_layers(self.ours, options)
        }
        attach(self.ours, options, seed=7)
        config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            target_modules=list(self.names.values()),
            lora_dropout=options.dropout,
        )
        self.theirs = peft.get_peft_model(theirs, config)
        self.copy()

    @torch.no_grad()
    def copy(self):
        """Draw B too, since at 0 it would hide A, and give both the same matrices."""
        generator = torch.Generator().manual_seed(3)
        for ours, theirs in self.matrices("B"):
            ours.copy_(torch.randn(ours.shape, generator=generator) * 0.2)
            theirs.copy_(ours)
        for ours, theirs in self.matrices("A"):
            theirs.copy_(ours)

    def matrices(self, which):
        """Yield (ours, theirs) of every A, or of every B."""
        own, other = (dict(m.named_parameters()) for m in (self.ours, self.theirs))
        for path, name in self.names.items():
            ends = f"lora_{which}.default.weight"
            yield own[f"{path}.{ends}"], other[f"base_model.model.{name}.{ends}"]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made = {}

    def of(model_type):
        if model_type not in made:
            made[model_type] = Twins(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return of


def inputs(ours):
    """Draw a batch with padding, and a target where the model has two sequences."""
    ids, mask = parity.padded(ours.options.vocab_size - 1, "right")
    given = {"input_ids": ids, "attention_mask": mask}
    if ours.abilities.two_sequences:
        given |= {"decoder_input_ids": ids.flip(0)[:, :17], "decoder_attention_mask": mask.flip(0)[:, :17]}  # fmt: skip
    return given, given.get("decoder_attention_mask", mask).bool()


def logits(model, given, real):
    return model(**given).logits[real]


def check_against_peft(pair):
    given, real = inputs(pair.ours)
    ours, theirs = logits(pair.ours, given, real), logits(pair.theirs, given, real)
    assert parity.relative_error(ours.detach(), theirs.detach()) < TOLERANCE
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    own, other = ((x * weights).sum() for x in (ours, theirs))
    for which in "AB":
        pairs = list(pair.matrices(which))
        got = torch.autograd.grad(own, [a for a, _ in pairs], retain_graph=True)
        expected = torch.autograd.grad(other, [b for _, b in pairs], retain_graph=True)
        largest = max(g.abs().max() for g in expected)
        for mine, reference in zip(got, expected, strict=True):
            assert (mine - reference).abs().max() < TOLERANCE * largest
            assert reference.abs().max() > 1e-3 * largest  # none is left out


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(twins, model_type):
    check_against_peft(twins(model_type))


def test_the_factor_is_felt(tmp_path):
    with planted(adapter, "lora_alpha=options.alpha,", "lora_alpha=options.rank,"):
        pair = Twins("llama", tmp_path)
    with pytest.raises(AssertionError):
        check_against_peft(pair)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_merged_files_are_those_of_peft_byte_for_byte(twins, model_type, tmp_path):
    pair = Twins(model_type, tmp_path)  # peft merges in place
    state = merged(pair.ours, dict(pair.ours.state_dict()))
    save_model(pair.ours, None, tmp_path / "ours", state=state)
    pair.theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    names, tensors = {}, {}
    for who in ("ours", "theirs"):
        loaded = type(pair.theirs.base_model.model).from_pretrained(tmp_path / who)
        tensors[who] = loaded.state_dict()
        names[who] = set(tensors[who])
    assert names["ours"] == names["theirs"]
    base = type(pair.theirs.base_model.model).from_pretrained(pair.folder).state_dict()
    changed = 0
    for name, tensor in tensors["ours"].items():
        other = tensors["theirs"][name]
        assert np.array_equal(tensor.numpy().view(np.uint8), other.numpy().view(np.uint8)), name
        changed += not torch.equal(tensor, base[name])
    assert changed == len(pair.names)
    given, real = inputs(pair.ours)
    alone, _ = load_model(tmp_path / "ours")
    with torch.no_grad():
        assert parity.relative_error(logits(alone, given, real), logits(pair.ours, given, real)) < TOLERANCE  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_switched_off_it_is_the_base_model_bit_for_bit(twins, model_type):
    pair = twins(model_type)
    given, real = inputs(pair.ours)
    base, _ = load_model(pair.folder)
    flags = [p.requires_grad for p in pair.ours.parameters()]
    with torch.no_grad():
        with switched_off(pair.ours):
            off = logits(pair.ours, given, real)
        on = logits(pair.ours, given, real)
        assert torch.equal(off, logits(base, given, real))
    assert not torch.allclose(on, off)
    assert [p.requires_grad for p in pair.ours.parameters()] == flags
    with pytest.raises(RuntimeError), switched_off(pair.ours):
        raise RuntimeError
    with torch.no_grad():
        assert torch.equal(logits(pair.ours, given, real), on)


def test_it_changes_nothing_at_first_and_depends_on_the_seed_alone(twins):
    folder = twins("llama").folder
    models = [load_model(folder)[0] for _ in range(4)]
    given, real = inputs(models[0])
    for model, seed in zip(models[1:], (0, 0, 1), strict=True):
        torch.manual_seed(int(seed * 17 + id(model) % 1000))
        attach(model, OPTIONS, seed)
    with torch.no_grad():
        assert torch.equal(logits(models[1], given, real), logits(models[0], given, real))
    same, other = [dict(m.named_parameters()) for m in models[2:]]
    for name, parameter in models[1].named_parameters():
        assert torch.equal(parameter, same[name])
        if ".lora_A." in name:
            assert not torch.equal(parameter, other[name])
            assert parameter.abs().max() <= parameter.shape[1] ** -0.5


@pytest.mark.parametrize(
    ("head", "whole"), [("lm", 0), ("likelihood", 0), ("last", 1), ("value", 2)]
)
def test_the_adapter_and_a_new_head_are_trained_and_nothing_else(twins, head, whole):
    model, _ = load_model(twins("llama").folder, head=head)
    attach(model, AdapterOptions(name="lora", rank=2, targets=["q_proj", "down_proj"]), seed=0)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    adapters = [n for n in trained if adapter.is_adapter(n)]
    assert len(adapters) == 2 * 2 * model.options.n_layers
    assert {n.split(".")[3] for n in adapters} == {"q_proj", "down_proj"}
    assert [n for n in trained if n not in adapters] == [
        n for n, _ in model.named_parameters() if n.startswith("head.") and whole
    ]
    assert len(trained) - len(adapters) == whole


def test_a_target_that_is_no_linear_layer_is_named(twins):
    model, _ = load_model(twins("llama").folder)
    with pytest.raises(ConfigError) as caught:
        attach(model, AdapterOptions(name="lora", targets=["q_proj", "qkv"]), seed=0)
    assert "qkv names no linear layer" in str(caught.value)
    assert "down_proj, gate_proj, k_proj, out_proj, q_proj, up_proj, v_proj" in str(caught.value)
