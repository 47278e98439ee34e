"""Our decoder against transformers' Llama classes, loaded from the same directory."""

import pytest
import torch

from distllm.arch.io import load_model, save_model

transformers = pytest.importorskip("transformers")

WAYS = [
    {},
    {"tie_embeddings": False, "n_kv_heads": 4},
    {"n_kv_heads": 1, "d_head": 12, "rope_theta": 500.0, "norm_eps": 1e-3},
]


def theirs(folder, kind="AutoModelForCausalLM"):
    cls = getattr(transformers, kind)
    return cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def padding(side):
    mask = torch.ones(3, 12, dtype=torch.long)
    if side == "right":
        mask[0, 9:], mask[1, 4:] = 0, 0
    if side == "left":
        mask[0, :3], mask[1, :8] = 0, 0
    return mask


def positions(mask):
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("way", WAYS)
def test_logits_are_equal(build, ids, tmp_path, way, side):
    model = build(**way)
    save_model(model, None, tmp_path / "m")
    reference, mask = theirs(tmp_path / "m"), padding(side)
    given = {} if side == "none" else {"attention_mask": mask}
    with torch.no_grad():
        expected = reference(input_ids=ids, position_ids=positions(mask), **given).logits
        got = model(ids, given.get("attention_mask")).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=2e-5)
    assert expected.abs().max() > 1


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_equal(build, ids, tmp_path, way):
    model = build(**way)
    save_model(model, None, tmp_path / "m")
    reference = theirs(tmp_path / "m")
    labels = ids.clone()
    labels[0, :5] = -100
    reference(input_ids=ids, labels=labels).loss.backward()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    hidden = model(ids, compute_logits=False).last_hidden_state
    (model.head.loss(hidden, shifted) / (shifted != -100).sum()).backward()
    found = {name: p.grad for name, p in reference.named_parameters()}
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        other = found[their_name(name)]
        error = (parameter.grad - other).norm() / other.norm()
        assert error < 1e-4, name


def their_name(name):
    for ours, hugging_face in (
        ("embed.", "model.embed_tokens."),
        ("final_norm.", "model.norm."),
        ("head.", "lm_head."),
        ("layers.", "model.layers."),
        ("attention_norm", "input_layernorm"),
        ("feed_forward_norm", "post_attention_layernorm"),
        (".attention.out_proj", ".self_attn.o_proj"),
        (".attention.", ".self_attn."),
        (".feed_forward.", ".mlp."),
    ):
        name = name.replace(ours, hugging_face)
    return name


@pytest.mark.parametrize("side", ["none", "right"])
def test_scores_equal_the_classification_model(build, ids, tmp_path, side):
    model = build("last")
    save_model(model, None, tmp_path / "m")
    reference, mask = theirs(tmp_path / "m", "AutoModelForSequenceClassification"), padding(side)
    assert type(reference).__name__ == "LlamaForSequenceClassification"
    reference.config.pad_token_id = 60
    padded = ids.clamp(max=59).masked_fill(mask == 0, 60)
    with torch.no_grad():
        expected = reference(input_ids=padded, attention_mask=mask).logits
        got = model(padded, mask).scores
    assert expected.shape == (3, 1)
    torch.testing.assert_close(got, expected[:, 0], rtol=0, atol=1e-5)


def test_their_directory_loads_as_ours(ids, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert tokenizer is None
    assert (model.options.rope_theta, model.options.norm_eps) == (300.0, 1e-4)
    with torch.no_grad():
        expected, got = reference(input_ids=ids).logits, model(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_greedy_continuation_equals_their_generate(build, ids, tmp_path):
    model = build()
    save_model(model, None, tmp_path / "m")
    reference, mask = theirs(tmp_path / "m"), padding("left")
    with torch.no_grad():
        expected = reference.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        )[:, 12:]
        cache = model.new_cache(3, 20, torch.float32, "cpu")
        tokens, given = [], ids
        for _ in range(8):
            given = model(given, mask, cache=cache).logits[:, -1:].argmax(dim=-1)
            tokens.append(given)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.cat(tokens, dim=1).tolist() == expected.tolist()
