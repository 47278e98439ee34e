"""Traps of reading foreign checkpoints, one test each. Where a wrong reading is possible, it is shown to fail."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm.arch.decoder import Decoder
from distllm.arch.hf.family import families
from distllm.arch.io import load_model, save_model
from distllm.arch.options import RopeStyle
from distllm.testing import parity

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5


def stored(name, tmp_path, head="lm", **changes):
    """Return (family, model of transformers, directory)."""
    family = families()[name]
    reference = parity.reference(family, head, **changes)
    return family, reference, parity.save(reference, tmp_path / name)


def error(model, reference, **given):
    ids, _ = parity.padded(97, "none")
    with torch.no_grad():
        return parity.relative_error(model(ids).logits, reference(input_ids=ids, **given).logits)


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("gpt2", {"lm_head.weight": "transformer.wte.weight"}),
        ("qwen2", {"lm_head.weight": "model.embed_tokens.weight"}),
        ("gemma", {"lm_head.weight": "model.embed_tokens.weight"}),
        (
            "bert",
            {
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
        (
            "roberta",
            {
                "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
                "lm_head.decoder.bias": "lm_head.bias",
            },
        ),
        ("modernbert", {"decoder.weight": "model.embeddings.tok_embeddings.weight"}),
    ],
)
def test_tied_copies_may_be_on_disk_or_not(tmp_path, name, copies):
    _, reference, folder = stored(name, tmp_path)
    assert not set(copies) & set(load_file(folder / "model.safetensors"))
    assert error(load_model(folder)[0], reference) <= TOLERANCE
    retensor(folder, lambda t: t.update({c: t[o].clone() for c, o in copies.items()}))
    again, _ = load_model(folder)
    assert error(again, reference) <= TOLERANCE
    save_model(again, None, tmp_path / "out")
    assert not set(copies) & set(load_file(tmp_path / "out/model.safetensors"))


def test_an_untied_model_has_its_own_matrix(tmp_path):
    _, reference, folder = stored("gpt2", tmp_path, tie_word_embeddings=False)
    ours, _ = load_model(folder)
    assert not torch.equal(ours.head.weight, ours.embed.weight)
    assert error(ours, reference) <= TOLERANCE


def test_conv1d_is_turned(tmp_path):
    _, reference, folder = stored("gpt2", tmp_path)
    tensors, ours = load_file(folder / "model.safetensors"), load_model(folder)[0]
    square = tensors["transformer.h.0.attn.c_proj.weight"]
    weight = ours.layers[0].attention.out_proj.weight
    assert torch.equal(weight, square.t()) and not torch.equal(weight, square)
    with torch.no_grad():  # the square matrix would fit unturned, without a word
        weight.copy_(square)
    assert error(ours, reference) > 1e-2


def test_gpt2_files_without_prefix_and_with_masks(tmp_path):
    """As the first ones were published."""
    _, reference, folder = stored("gpt2", tmp_path)

    def older(tensors):
        bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 160, 160).tril()
        bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return bare

    retensor(folder, older)
    assert error(load_model(folder)[0], reference) <= TOLERANCE


def test_old_bert_files(tmp_path):
    """Counted positions, gains named gamma, the next-sentence head, a pooler beside the language model."""
    _, reference, folder = stored("bert", tmp_path)

    def older(tensors):
        names = {n: n.replace("LayerNorm.weight", "LayerNorm.gamma") for n in tensors}
        names = {n: m.replace("LayerNorm.bias", "LayerNorm.beta") for n, m in names.items()}
        found = {names[n]: t for n, t in tensors.items()}
        found["bert.embeddings.position_ids"] = torch.arange(64)[None]
        found["cls.seq_relationship.weight"] = torch.zeros(2, 64)
        found["cls.seq_relationship.bias"] = torch.zeros(2)
        found["bert.pooler.dense.weight"] = torch.zeros(64, 64)
        found["bert.pooler.dense.bias"] = torch.zeros(64)
        return found

    retensor(folder, older)
    assert error(load_model(folder)[0], reference) <= TOLERANCE


def test_qwen3_experts_stand_alone_on_disk(tmp_path):
    _, reference, folder = stored("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.experts.5.gate_proj.weight"].shape == (32, 64)
    assert "model.layers.1.mlp.gate_proj.weight" in tensors  # a dense layer between
    ours, _ = load_model(folder)
    stacked = ours.layers[0].feed_forward.gate_up_proj
    in_memory = dict(reference.named_parameters())["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(stacked, in_memory)
    with torch.no_grad():  # up before gate
        stacked.copy_(torch.cat(list(reversed(stacked.chunk(2, dim=1))), dim=1))
    assert error(ours, reference) > 1e-2


def test_gpt_oss_experts_are_turned_and_take_turns(tmp_path):
    _, reference, folder = stored("gpt_oss", tmp_path)
    disk = load_file(folder / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
    assert disk.shape == (
        6,
        64,
        64,
    )  # (experts, in, gate and up taking turns): square, so nothing would complain
    ours, _ = load_model(folder)
    stacked = ours.layers[0].feed_forward.gate_up_proj
    assert torch.equal(stacked[2, 5], disk[2, :, 10]) and torch.equal(stacked[2, 32], disk[2, :, 1])
    assert error(ours, reference) <= TOLERANCE
    with torch.no_grad():
        stacked.copy_(disk.transpose(1, 2))
    assert error(ours, reference) > 1e-2


def test_released_gpt_oss_files_are_packed(tmp_path):
    """MXFP4 blocks and scales instead of matrices."""
    from distllm.arch.hf.mxfp4 import unpack

    family, _, folder = stored("gpt_oss", tmp_path)
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.down_proj"
    blocks = torch.randint(0, 256, (6, 64, 1, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 126, (6, 64, 1), dtype=torch.uint8, generator=generator)

    def pack(tensors):
        del tensors[name]
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales

    retensor(folder, pack)
    ours, _ = load_model(folder)
    expected = unpack(blocks, scales).float().transpose(1, 2)
    assert torch.equal(ours.layers[0].feed_forward.down_proj, expected)
    assert family.model_type == "gpt_oss"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_on_disk_is_kept_only_when_asked_for(tmp_path, dtype):
    family = families()["llama"]
    folder = parity.save(parity.reference(family).to(dtype), tmp_path / "m")
    assert load_model(folder)[0].embed.weight.dtype == torch.float32
    assert load_model(folder, dtype=None)[0].embed.weight.dtype == dtype


OLDER = [
    ("llama", {"rope_theta": 700.0}),
    ("llama", {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    (
        "llama",
        {
            "rope_theta": 700.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    ("qwen2", {"rope_theta": 700.0}),
    ("gemma3_text", {"rope_theta": 700.0, "rope_local_base_freq": 90.0}),
    (
        "gemma3_text",
        {
            "rope_theta": 700.0,
            "rope_local_base_freq": 90.0,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        },
    ),
    ("modernbert", {"global_rope_theta": 700.0, "local_rope_theta": 90.0}),
    ("glm", {"rope_theta": 700.0, "partial_rotary_factor": 0.25}),
    (
        "gpt_oss",
        {
            "rope_theta": 700.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 40,
            },
        },
    ),
]


@pytest.mark.parametrize(("name", "settings"), OLDER)
def test_older_rotary_settings(tmp_path, name, settings):
    """Files of transformers 4 say the same in other words; transformers itself is asked what they mean."""
    family, _, folder = stored(name, tmp_path)

    def older(config):
        del config["rope_parameters"]
        config.pop("rope_theta", None)
        config.update(settings)

    newer = load_model(folder)[0]
    edit(folder, older)
    reference = getattr(transformers, family.architectures["lm"]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert error(load_model(folder)[0], reference.eval()) <= TOLERANCE
    assert error(newer, reference) > 1e-3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma2", lambda c: c.pop("layer_types")),
        ("gemma3_text", lambda c: c.update(layer_types=None, sliding_window_pattern=3)),
        ("modernbert", lambda c: c.update(layer_types=None, global_attn_every_n_layers=2)),
        ("gpt_oss", lambda c: c.pop("layer_types")),
        ("olmo3", lambda c: c.pop("layer_types")),
        ("qwen2", lambda c: c.pop("layer_types")),
        ("qwen3_moe", lambda c: c.update(mlp_only_layers=[], decoder_sparse_step=1)),
    ],
)
def test_types_of_layers_may_be_left_out(tmp_path, name, change):
    family, _, folder = stored(name, tmp_path)
    edit(folder, change)
    config = transformers.AutoConfig.from_pretrained(folder)
    expected = getattr(config, "layer_types", None)
    options = family.read_options(json.loads((folder / "config.json").read_text()))
    if expected is not None:
        from distllm.arch.hf.family import expand_layer_types

        assert expand_layer_types(options) == expected
    else:
        assert options.dense_layers == []


def test_gemmas_scale_is_rounded_to_the_dtype_of_the_weights(tmp_path):
    """sqrt(d) has no exact bfloat16; a model that scales in float32 would drift."""
    _, _, folder = stored("gemma", tmp_path, hidden_size=96, num_attention_heads=4)
    reference = transformers.GemmaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours, _ = load_model(folder, dtype=torch.bfloat16)
    ids, _ = parity.padded(97, "none")
    expected = reference.model.embed_tokens(ids)
    got = ours._front(ours.embed(ids), torch.arange(parity.SEQ)[None], None, torch.bfloat16)
    assert torch.equal(got, expected)
    assert not torch.equal((ours.embed(ids).float() * 96**0.5).bfloat16(), expected)


def test_interleaved_pairs_are_a_permutation_of_halves(tmp_path):
    """Permuting the rotary rows of queries and keys turns one style into the other; the rest of each head stays."""
    _, reference, folder = stored("glm", tmp_path)
    ours, _ = load_model(folder)
    half = Decoder(replace(ours.options, rope_style=RopeStyle.half)).eval()
    state = ours.state_dict()
    for name, value in state.items():
        if ".q_proj." in name or ".k_proj." in name:
            heads = value.view(-1, 16, *value.shape[1:])
            turned = heads[:, :8].unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2)
            state[name] = torch.cat((turned, heads[:, 8:]), dim=1).reshape(value.shape)
    half.load_state_dict(state)
    assert error(half, reference) <= TOLERANCE


def test_windows_of_encoders_reach_half_to_each_side_and_of_decoders_back(tmp_path):
    """ModernBERT's local_attention=10 lets a token see 5 on each side; Mistral's sliding_window=7 itself and 6 before."""
    for name, reach_back, reach_ahead in (("modernbert", 5, 5), ("mistral", 6, 0)):
        changes = {"num_hidden_layers": 1}
        if name == "modernbert":
            changes["layer_types"] = ["sliding_attention"]
        _, _, folder = stored(name, tmp_path, **changes)
        ours, _ = load_model(folder)
        ids, _ = parity.padded(97, "none", rows=1)
        with torch.no_grad():
            before = ours(ids).logits[0]
            for at in (0, 11):
                other = ids.clone()
                other[0, at] = 3
                moved = (ours(other).logits[0] - before).abs().amax(dim=-1) > 0
                seen = moved.nonzero()[:, 0].tolist()
                assert seen == list(range(max(0, at - reach_ahead), at + reach_back + 1))
