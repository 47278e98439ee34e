"""Documents packed into one row know nothing of each other, in every family there is: values and gradients.

A new file in `arch/` or `arch/hf/` is tested here on arrival.
"""

import pytest
import torch
import torch.nn.functional as F
from patched import planted

from distllm import registry
from distllm.arch.hf.family import families
from distllm.arch.options import TransformerOptions, has_experts
from distllm.layers import masks

transformers = pytest.importorskip("transformers")

A, B, PAD = 9, 12, 3
FAMILIES = sorted(families())
KERNELS = ["auto", "eager", "sdpa", "sdpa_math"]
OWN = {
    "glm": {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "vocab_size": 97, "max_seq_len": 64},
    "lstm": {"d_model": 32, "d_hidden": 48, "n_layers": 2, "vocab_size": 97},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """Return a function that gives a small random model of a family, whose tokens matter to each other."""
    made = {}

    def of(name):
        if name not in made:
            family = families()[name]
            if family.tiny:
                config = transformers.AutoConfig.for_model(family.model_type, **family.tiny)
                options = family.read_options(config.to_dict())
            else:
                options = family.options_class(**OWN[family.arch])
            built = registry.get("arch", family.arch)(options).eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in built.parameters():
                    if parameter.ndim > 1:
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            made[name] = built
        return made[name]

    return of


def a_row(model, first, second):
    """Pack two documents and padding into a row; a decoder gets both as its targets too, in lengths of its own."""

    def packed(ids_a, ids_b):
        ids = torch.tensor([[*ids_a, *ids_b, *[1] * PAD]])
        marks = torch.tensor([[1] * len(ids_a) + [2] * len(ids_b) + [0] * PAD])
        return ids, marks

    ids, marks = packed(first, second)
    given = {"input_ids": ids, "segment_ids": marks}
    if model.abilities.two_sequences:
        targets, target_marks = packed(first[:5], second[:7])
        given |= {"decoder_input_ids": targets, "decoder_segment_ids": target_marks}
        return given, target_marks
    if model.options.name == "glm":  # the text before what is said, per document
        given["prefix_lengths"] = (marks == 1) * 4 + (marks == 2) * 6
        places = torch.tensor([*range(len(first)), *range(len(second)), *[0] * PAD])
        said = (places - given["prefix_lengths"][0] + 1).clamp(min=0)
        given["position_ids"] = torch.stack((places, said))[None]
    return given, marks


def run(model, given):
    """Return the logits and, for each sequence, the embeddings they were made of."""
    leaves = []

    def detach(module, inputs, out):
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    hook = model.embed.register_forward_hook(detach)
    try:
        return model(**given).logits, leaves
    finally:
        hook.remove()


def documents(seed, length_a=A):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(4, 90, (2, 20), generator=generator).tolist()
    return first[0][:length_a], first[1][:length_a], torch.randint(4, 90, (B,), generator=generator).tolist()  # fmt: skip


def check(model):
    """Raise AssertionError where document B feels document A."""
    first, other, second = documents(1)
    options = model.options
    is_transformer = isinstance(options, TransformerOptions)
    is_dense = not (
        is_transformer and any(has_experts(options, i) for i in range(options.n_layers))
    )
    given, marks = a_row(model, first, second)
    logits, leaves = run(model, given)
    of_b = logits[0][marks[0] == 2]
    changed = run(model, a_row(model, other, second)[0])[0][0][marks[0] == 2]
    largest = float(of_b.detach().abs().max())
    assert largest > 0.02
    if is_dense:
        assert torch.equal(of_b, changed)
    else:
        assert float((of_b - changed).detach().abs().max()) <= 1e-5 * largest
    longer, longer_marks = a_row(model, documents(3, 14)[0], second)
    moved = run(model, longer)[0][0][longer_marks[0] == 2]
    assert float((of_b - moved).detach().abs().max()) <= 1e-5 * largest

    loss = F.cross_entropy(of_b, torch.arange(len(of_b)) + 5)
    loss.backward()
    streams = [given["segment_ids"]] + [marks] * (len(leaves) - 1)
    for leaf, stream in zip(leaves, streams, strict=True):
        assert bool((leaf.grad[0][stream[0] == 1] == 0).all())
        assert float(leaf.grad[0][stream[0] == 2].abs().max()) > 0
    # The test can see influence at all: within document B a token does reach later ones.
    nearer = [*second]
    nearer[0] = (nearer[0] + 7) % 80 + 4
    assert not torch.equal(of_b, run(model, a_row(model, first, nearer)[0])[0][0][marks[0] == 2])


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_do_not_leak(model, name):
    check(model(name))


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "t5", "distllm_glm"])
def test_with_any_kernel(model, name, kernel, monkeypatch):
    for module in model(name).modules():
        if hasattr(module, "attention_kernel"):
            monkeypatch.setattr(module, "attention_kernel", kernel)
    check(model(name))


def test_every_architecture_is_among_the_families():
    """`auto` wraps foreign models; what it does with packed rows is tested beside it."""
    assert {families()[n].arch for n in FAMILIES} == set(registry.names("arch")) - {"auto"}


@pytest.mark.parametrize("name", ["llama", "modernbert", "t5", "distllm_glm"])
def test_a_leak_is_noticed(model, name):
    own = "other = segments[:, past:, None] != segments[:, None, :]"
    with planted(masks, own, own.replace("!=", "<")), pytest.raises(AssertionError):
        check(model(name))


def test_a_leak_across_is_noticed(model):
    own = "visible = queries[:, :, None] == keys[:, None, :]"
    with planted(masks, own, own.replace("==", ">=")), pytest.raises(AssertionError):
        check(model("bart"))
