"""GLM against GPT-2 of transformers, which computes the same when it is given embeddings, positions and a 4-D mask."""

import pytest
import torch
from patched import with_bug

from distllm.arch import glm as glm_module
from distllm.arch.glm import GLM, GLMOptions
from distllm.arch.io import load_model, save_model
from distllm.errors import ConfigError
from distllm.testing import parity

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 97, "d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "d_ff": 256, "max_seq_len": 60,
    "blank_id": 90, "start_id": 91,
}  # fmt: skip
PLACES = [[0, 1, 2, 3, 4, 5, 6, 4, 4, 4, 2, 2], [0] * 7 + [1, 2, 3, 1, 2]]
"""The worked case: text x0..x7, spans {2} and {4 5}, order swapped."""
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pair():
    """Return (ours, GPT-2 with the same weights and GLM's first position table)."""
    family = type("F", (), {})()
    family.model_type, family.tiny = "gpt2", {
        "vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 61,
    }  # fmt: skip
    family.architectures = {"lm": "GPT2LMHeadModel"}
    reference = parity.reference(family)
    return of_gpt2(GLM, reference), reference


def of_gpt2(cls, reference):
    """Build our model with the weights of `reference`; the second position table is drawn."""
    ours, theirs = cls(GLMOptions(**TINY)), reference.state_dict()
    state = {
        "embed.weight": theirs["transformer.wte.weight"],
        "place_embed.weight": theirs["transformer.wpe.weight"],
        "span_embed.weight": torch.randn(61, 64, generator=torch.Generator().manual_seed(8)),
    }
    for kind in ("weight", "bias"):
        state[f"final_norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(3):
            there, here = f"transformer.h.{i}.", f"layers.{i}."
            state[f"{here}attention_norm.{kind}"] = theirs[f"{there}ln_1.{kind}"]
            state[f"{here}feed_forward_norm.{kind}"] = theirs[f"{there}ln_2.{kind}"]
            parts = theirs[f"{there}attn.c_attn.{kind}"].t().chunk(3)
            state |= {
                f"{here}attention.{x}_proj.{kind}": p for x, p in zip("qkv", parts, strict=True)
            }
            for name, part in (
                ("attn.c_proj", "attention.out_proj"),
                ("mlp.c_fc", "feed_forward.up_proj"),
                ("mlp.c_proj", "feed_forward.down_proj"),
            ):
                state[f"{here}{part}.{kind}"] = theirs[f"{there}{name}.{kind}"].t()
    ours.load_state_dict(state)
    return ours.eval()


def by_gpt2(reference, ours, ids, positions, visible):
    """Compute logits by transformers; `visible` [batch, seq, seq] bool says who sees whom."""
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    embedded = reference.transformer.wte(ids) + ours.span_embed(positions[:, 1])
    return reference(
        inputs_embeds=embedded, position_ids=positions[:, 0], attention_mask=bias
    ).logits


def case(rows=2):
    ids = torch.randint(0, 90, (rows, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor(PLACES).expand(rows, -1, -1)
    visible = torch.ones(12, 12).tril().bool()
    visible[:, :7] = True
    return ids, positions, visible.expand(rows, -1, -1)


def error(ours, reference):
    ids, positions, visible = case()
    with torch.no_grad():
        expected = by_gpt2(reference, ours, ids, positions, visible)
        return parity.relative_error(ours(ids, position_ids=positions).logits, expected)


def test_logits_are_those_of_gpt2_with_a_prefix_mask(pair):
    assert error(*pair) <= TOLERANCE


@pytest.mark.parametrize(
    "old, new",
    [
        ("x + self.place_embed(place) + self.span_embed(in_span)", "x + self.place_embed(place)"),
        ("place, in_span = position_ids.unbind(dim=1)", "in_span, place = position_ids.unbind(dim=1)"),
        ("in_text = in_span == 0", "in_text = in_span > 0"),
        ("super().__init__(options, causal=True)", "super().__init__(options, causal=False)"),
    ],
    ids=["no second position", "positions swapped", "parts swapped", "part B sees ahead"],
)  # fmt: skip
def test_a_wrong_layout_shows(pair, old, new):
    wrong = of_gpt2(with_bug(glm_module, old, new).GLM, pair[1])
    assert error(wrong, pair[1]) > TOLERANCE


def test_gradients_are_those_of_gpt2(pair):
    ours, reference = pair
    ids, positions, visible = case()
    factors = torch.randn(2, 12, 97, generator=torch.Generator().manual_seed(4)) / 97
    theirs = parity.gradients(
        (by_gpt2(reference, ours, ids, positions, visible) * factors).sum(), reference
    )
    found = parity.gradients((ours(ids, position_ids=positions).logits * factors).sum(), ours)
    pairs = {
        "embed.weight": theirs["transformer.wte.weight"],
        "place_embed.weight": theirs["transformer.wpe.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
        "layers.0.feed_forward.up_proj.weight": theirs["transformer.h.0.mlp.c_fc.weight"].t(),
        "layers.2.attention.v_proj.weight": theirs["transformer.h.2.attn.c_attn.weight"].t()[128:],
        "layers.1.attention.q_proj.bias": theirs["transformer.h.1.attn.c_attn.bias"][:64],
    }
    for name, expected in pairs.items():
        assert parity.relative_error(found[name], expected) <= 1e-4, name


def test_part_a_does_not_see_part_b(pair):
    ours, _ = pair
    ids, positions, _ = case()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 90
    with torch.no_grad():
        first, second = (ours(i, position_ids=positions).logits for i in (ids, other))
    assert torch.equal(first[:, :7], second[:, :7]) and not torch.equal(first[:, 7:], second[:, 7:])


def test_packed_rows_give_what_each_gives_alone(pair):
    ours, _ = pair
    ids, positions, _ = case(1)
    row = torch.cat([ids, ids.flip(1)[:, :12], ids[:, :3]], dim=1)
    places = torch.cat([positions, positions, positions[:, :, :3]], dim=2)
    segments = torch.tensor([[1] * 12 + [2] * 12 + [0] * 3])
    with torch.no_grad():
        got = ours(row, position_ids=places, segment_ids=segments).logits
        for start in (0, 12):
            alone = ours(row[:, start : start + 12], position_ids=positions).logits
            assert parity.relative_error(got[:, start : start + 12], alone) <= TOLERANCE
        swapped = row.clone()
        swapped[:, :12] = row[:, 12:24]
        again = ours(swapped, position_ids=places, segment_ids=segments).logits
    assert torch.equal(again[:, 12:24], got[:, 12:24])


def test_join_lays_a_prompt_and_its_answer_out(pair):
    ours, reference = pair
    batch = ours.join([[5, 6, 7], [8]], [[10, 11], [12, 13, 14]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 90, 91, 10, 11], [8, 90, 91, 12, 13, 14, 0]]
    assert batch.labels.tolist()[0] == [-100] * 4 + [10, 11, -100]
    assert batch.labels.tolist()[1] == [-100] * 2 + [12, 13, 14, -100, -100]
    assert batch.position_ids[0].tolist() == [[0, 1, 2, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3]]
    assert batch.position_ids[1, :, :6].tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4]]
    visible = torch.ones(7, 7).tril().bool()
    visible[:, :4] = True
    with torch.no_grad():
        got = ours(**batch.inputs()).logits
        expected = by_gpt2(
            reference, ours, batch.input_ids[:1], batch.position_ids[:1], visible[None]
        )
    assert parity.relative_error(got[:1], expected) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_a_cache_change_nothing(pair, side):
    ours, _ = pair
    batch = ours.join([[5, 6, 7], [8]], [[10, 11, 12], [13, 14, 15]], pad_id=0)
    with torch.no_grad():
        whole = [
            ours(
                batch.input_ids[r][None, batch.attention_mask[r]],
                position_ids=batch.position_ids[r][None, :, batch.attention_mask[r]],
            ).logits[0]
            for r in range(2)
        ]
        ids, mask = (
            torch.tensor([[5, 6, 7, 90], [8, 90, 0, 0]]),
            torch.tensor([[1] * 4, [1, 1, 0, 0]]),
        )
        if side == "left":
            ids, mask = torch.tensor([[5, 6, 7, 90], [0, 0, 8, 90]]), mask.flip(1)
        mask = mask.bool()
        cache = ours.new_cache(2, 8, torch.float32, "cpu")
        first = ours(ids, mask, cache=cache).logits
        for r in range(2):
            own = first[r][mask[r]]
            assert parity.relative_error(own, whole[r][: len(own)]) <= TOLERANCE
        if side == "right":
            return
        for t in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], dim=1)
            said = torch.tensor([[91, 10, 11, 12], [91, 13, 14, 15]])[:, t : t + 1]
            positions = torch.tensor([[[3], [t + 1]], [[1], [t + 1]]])
            got = ours(said, mask, position_ids=positions, cache=cache).logits[:, 0]
            for r, length in enumerate((4, 2)):
                assert parity.relative_error(got[r], whole[r][length + t]) <= TOLERANCE


def test_bad_input_is_named(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match=r"position_ids has shape \[1, 3\]"):
        ours(torch.ones(1, 3, dtype=torch.int64), position_ids=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="need position_ids"):
        ours(torch.ones(1, 3, dtype=torch.int64), segment_ids=torch.ones(1, 3, dtype=torch.int64))
    bare = GLM(GLMOptions(**(TINY | {"start_id": None})))
    with pytest.raises(ConfigError, match=r"arch\.start_id=None"):
        bare.join([[1]], [[2]], 0)


def test_it_is_saved_and_read(pair, tmp_path):
    ours, _ = pair
    save_model(ours, None, tmp_path / "m")
    again, _ = load_model(tmp_path / "m")
    ids, positions, _ = case()
    assert again.options == ours.options
    assert torch.equal(
        again(ids, position_ids=positions).logits, ours(ids, position_ids=positions).logits
    )
