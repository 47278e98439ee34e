"""What must hold for a causal model whatever its weights: causality, padding, packing, cache, precision."""

import inspect
from fnmatch import fnmatchcase

import pytest
import torch

from distllm import types
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.errors import ConfigError

WAYS = [{"n_kv_heads": 1}, {"n_kv_heads": 4}, {"d_head": 10}, {"tie_embeddings": False}]


@pytest.mark.parametrize("way", WAYS)
def test_shapes(build, ids, way):
    out = build(**way)(ids)
    assert out.logits.shape == (3, 12, 61)
    assert out.last_hidden_state.shape == (3, 12, 32)
    assert out.scores is out.values is out.encoder_states is out.aux is None
    assert build(**way)(ids, compute_logits=False).logits is None


def test_a_later_token_changes_no_earlier_logit(build, ids):
    model = build()
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 61
    before, after = model(ids).logits, model(other).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(build, ids, side):
    model = build()
    lengths = (12, 5, 1)
    padded, mask = torch.full((3, 12), 3), torch.zeros(3, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(12 - length, 12)
        padded[row, at], mask[row, at] = ids[row, :length], True
    logits = model(padded, mask).logits
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row, mask[row]], alone, rtol=0, atol=1e-5)
    assert logits.isfinite().all()


def test_padding_gets_no_gradient(build, ids):
    model = build(dtype=torch.float64)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, :4] = False
    embeds = model.embed(ids).detach().requires_grad_()
    out = model(inputs_embeds=embeds, attention_mask=mask).logits
    (grad,) = torch.autograd.grad(out[mask].square().sum(), embeds)
    assert (grad[0, :4] == 0).all()
    assert (grad[mask] != 0).any(dim=-1).all()


def test_packed_documents_equal_separate_ones(build, ids):
    model = build()
    pieces = [ids[0, :5], ids[1, :1], ids[2, :6]]
    segments = torch.tensor([[1] * 5 + [2] + [3] * 6])
    packed = model(torch.cat(pieces)[None], segment_ids=segments).logits[0]
    alone = torch.cat([model(p[None]).logits[0] for p in pieces])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_one_document_sends_no_gradient_into_another(build, ids):
    model = build(dtype=torch.float64)
    segments = torch.tensor([[1] * 5 + [2] * 7]).expand(3, -1)
    embeds = model.embed(ids).detach().requires_grad_()
    hidden = model(inputs_embeds=embeds, segment_ids=segments).last_hidden_state
    labels = ids.roll(-1, 1).masked_fill(segments == 1, -100)
    (grad,) = torch.autograd.grad(model.head.loss(hidden, labels), embeds)
    assert (grad[:, :5] == 0).all()
    assert (grad[:, 5:] != 0).any()


def test_packed_padding_is_ignored(build, ids):
    model = build()
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]]).expand(3, -1)
    other = torch.where(segments == 0, (ids + 1) % 61, ids)
    real = segments != 0
    a, b = (model(x, segment_ids=segments).logits for x in (ids, other))
    assert torch.equal(a[real], b[real])


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 3, 2]])
def test_decoding_with_a_cache_equals_one_forward(build, ids, n_kv_heads, chunks):
    model = build(n_kv_heads=n_kv_heads, dtype=torch.float64)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, :3], mask[2, :1] = False, False
    expected = model(ids, mask).logits
    cache = model.new_cache(3, 15, torch.float64, "cpu")
    got, start = [], 0
    for size in chunks:
        end = start + size
        got.append(model(ids[:, start:end], mask[:, :end], cache=cache).logits)
        start = end
    assert cache.length == 12
    got = torch.cat(got, dim=1)
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-10)


def test_a_cache_follows_selected_and_repeated_rows(build, ids):
    model = build(dtype=torch.float64)
    cache = model.new_cache(3, 10, torch.float64, "cpu")
    model(ids[:, :6], cache=cache)
    rows = torch.tensor([2, 0])
    cache.select(rows).repeat(2)
    rows = rows.repeat_interleave(2)
    following = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    got = torch.cat([model(following[:, i : i + 1], cache=cache).logits for i in range(2)], dim=1)
    expected = model(torch.cat((ids[rows, :6], following), dim=1)).logits[:, 6:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_float64_runs_in_float64(build, ids):
    """A rounding to float32 anywhere would show as a difference near 1e-7 to a much finer derivative."""
    model = build(dtype=torch.float64)
    labels = ids.roll(-1, 1)

    def loss():
        return model.head.loss(model(ids, compute_logits=False).last_hidden_state, labels)

    generator = torch.Generator().manual_seed(0)
    value = loss()
    assert value.dtype == torch.float64
    value.backward()
    for name in ("embed.weight", "layers.1.attention.q_proj.weight", "final_norm.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction /= direction.norm()
        step = 1e-4
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                values.append(loss())
                parameter.add_(direction, alpha=-sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        expected = (parameter.grad * direction).sum()
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_stays_near_float32(build, ids):
    model = build()
    exact = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_bfloat16_weights_run_and_learn(build, ids):
    exact, model = build(), build(dtype=torch.bfloat16)
    out = model(ids)
    assert out.logits.dtype == torch.bfloat16
    assert (out.logits - exact(ids).logits).norm() < 0.05 * exact(ids).logits.norm()
    model.head.loss(out.last_hidden_state, ids.roll(-1, 1)).backward()
    assert all(
        p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_initial_weights_depend_on_seed_and_name_only(options):
    torch.manual_seed(0)
    one = Decoder(options, seed=4).state_dict()
    torch.manual_seed(1)
    torch.randn(3)
    options.n_layers = 1
    short = Decoder(options, head="value", seed=4).state_dict()
    shared = [k for k in short if k in one and "out_proj" not in k and "down_proj" not in k]
    assert len(shared) > 5
    assert all(torch.equal(one[k], short[k]) for k in shared)
    other = Decoder(options, seed=5).state_dict()
    assert not torch.equal(other["embed.weight"], short["embed.weight"])


def test_projections_into_the_residual_stream_start_smaller(build):
    model = build(d_model=128, n_layers=8)
    std = model.get_parameter("layers.3.feed_forward.down_proj.weight").std().item()
    assert std == pytest.approx(0.2 / 4, rel=0.05)
    assert model.get_parameter("layers.3.attention.q_proj.weight").std().item() == pytest.approx(
        0.2, rel=0.05
    )


def test_dropout_draws_from_the_global_generator_in_training_only(build, ids):
    model = build(dropout=0.5)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    torch.manual_seed(5)
    one = model(ids).logits
    two = model(ids).logits
    torch.manual_seed(5)
    assert torch.equal(one, model(ids).logits)
    assert not torch.equal(one, two)


def test_dropout_of_everything_leaves_the_embedding(build, ids):
    """Both parts of every block are dropped, and nothing else is."""
    model = build(dropout=1.0).train()
    expected = model.final_norm(model.embed(ids))
    assert torch.equal(model(ids).last_hidden_state, expected)


def test_dropout_keeps_the_expected_value(build, ids):
    model = build(dropout=0.1, n_layers=1, dtype=torch.float64)
    exact = model(ids).last_hidden_state
    block = model.layers[0]
    torch.manual_seed(0)
    x = torch.ones(200, 200)
    model.train()
    dropped = block._drop(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(model(ids).last_hidden_state, exact)


@pytest.mark.parametrize(
    "name",
    [
        "token_type_ids",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_position_ids",
        "decoder_segment_ids",
        "encoder_states",
    ],
)
def test_an_argument_it_cannot_use_is_refused_by_name(build, ids, name):
    with pytest.raises(ValueError, match=name):
        build()(ids, **{name: ids})


def test_the_signature_is_the_one_every_model_has():
    ours = inspect.signature(Decoder.forward).parameters
    agreed = inspect.signature(types.Model.__call__).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in agreed.values()
    ]


def test_ids_and_embeddings_exclude_each_other(build, ids):
    model = build()
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=model.embed(ids))
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_too_long_a_sequence_names_both_numbers(build):
    model = build(max_seq_len=8)
    with pytest.raises(ValueError, match=r"9 tokens.*max_seq_len=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = model.new_cache(1, 20, torch.float32, "cpu")
    model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match=r"9 tokens.*max_seq_len=8"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, ["n_heads=4", "n_kv_heads=3"]),
        ({"d_model": 30, "n_heads": 4}, ["d_model=30", "n_heads=4", "d_model=28"]),
        ({"d_head": 7}, ["d_head=7", "8"]),
    ],
)
def test_impossible_shapes_are_refused_in_numbers(changes, words):
    with pytest.raises(ConfigError) as error:
        Decoder(DecoderOptions(**changes))
    assert all(word in str(error.value) for word in words)


def test_an_unknown_head_gets_the_nearest_name(options):
    with pytest.raises(ConfigError, match="Did you mean likelihood"):
        Decoder(options, head="likelyhood")


def test_join_labels_exactly_the_response_tokens(build):
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11, 12], []]
    batch = build().join(prompts, responses, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 7, 8], [4, 9, 10, 11, 12], [5, 6, 0, 0, 0]]
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 5, 2]
    for row, response in enumerate(responses):
        labels = batch.labels[row]
        assert labels[labels != -100].tolist() == response
        for position in (labels != -100).nonzero()[:, 0]:
            assert batch.input_ids[row, position + 1] == labels[position]


def test_join_refuses_an_empty_prompt(build):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        build().join([[1], []], [[2], [3]], pad_id=0)


@pytest.mark.parametrize("head", ["lm", "likelihood", "last", "value"])
def test_every_parameter_is_in_the_shard_plan_once(build, head):
    model = build(head, tie_embeddings=False)
    plan = model.shard_plan()
    for name, _ in model.named_parameters():
        scalar_head = name.startswith("head.") and head in ("last", "value")
        found = [pattern for pattern in plan if fnmatchcase(name, pattern)]
        assert len(found) == (0 if scalar_head else 1), name


def test_blocks_are_the_layers_in_order(build):
    model = build()
    assert [b.attention.layer for b in model.blocks()] == [0, 1, 2]


@pytest.mark.parametrize("packed", [False, True])
def test_traced_for_compilation_it_computes_the_same(build, ids, packed):
    """`backend="eager"` runs the graph that a compiler would get, without needing one."""
    model = build()
    segments = torch.tensor([[1] * 5 + [2] * 7]).expand(3, -1) if packed else None
    expected = model(ids, segment_ids=segments).logits
    for block in model.blocks():
        block.compile(backend="eager", fullgraph=True)
    got = model(ids, segment_ids=segments).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
