"""Heads against the definitions of what they return."""

import pytest
import torch
import torch.nn.functional as F

from distllm.types import Batch


def labelled(ids, share=0.5):
    labels = ids.roll(-1, 1)
    keep = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) < share
    return labels.masked_fill(~keep, -100)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_sum_over_labels(build, ids, share, tied):
    model = build(dtype=torch.float64, tie_embeddings=tied)
    labels = labelled(ids, share)
    out = model(ids)
    expected = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    got = model.head.loss(out.last_hidden_state, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(got, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_logprobs_stand_where_the_labels_are(build, ids, share):
    model = build(dtype=torch.float64)
    labels = labelled(ids, share)
    out = model(ids)
    logprobs, entropy = model.head.logprobs(out.last_hidden_state, labels, 0.8)
    exact = torch.log_softmax(out.logits / 0.8, dim=-1)
    for row in range(3):
        for t in range(12):
            label = labels[row, t]
            expected = 0.0 if label == -100 else exact[row, t, label].item()
            assert logprobs[row, t].item() == pytest.approx(expected, abs=1e-10)
            spread = 0.0 if label == -100 else -(exact[row, t].exp() * exact[row, t]).sum().item()
            assert entropy[row, t].item() == pytest.approx(spread, abs=1e-10)
    (logprobs.sum() + entropy.sum()).backward()


def test_likelihood_scores_are_summed_logprobs(build, ids):
    model = build("likelihood", dtype=torch.float64)
    labels = labelled(ids)
    out = model(ids)
    scores = model.head.scores(out.last_hidden_state, Batch(input_ids=ids, labels=labels))
    exact = torch.log_softmax(out.logits, dim=-1)
    for row in range(3):
        total = sum(
            exact[row, t, labels[row, t]].item() for t in range(12) if labels[row, t] != -100
        )
        assert scores[row].item() == pytest.approx(total, abs=1e-10)


def test_likelihood_scores_need_labels(build, ids):
    model = build("likelihood")
    with pytest.raises(ValueError, match="labels"):
        model.head.scores(model(ids).last_hidden_state, Batch(input_ids=ids))


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_the_score_is_read_at_the_last_real_token(build, ids, side):
    model = build("last", dtype=torch.float64)
    lengths = (12, 12, 12) if side == "none" else (12, 5, 1)
    padded, mask = torch.full((3, 12), 9), torch.zeros(3, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(12 - length, 12)
        padded[row, at], mask[row, at] = ids[row, :length], True
    out = model(padded, None if side == "none" else mask)
    for row, length in enumerate(lengths):
        hidden = model(ids[row : row + 1, :length]).last_hidden_state[0, -1]
        expected = (hidden @ model.head.weight[0]).item()
        assert out.scores[row].item() == pytest.approx(expected, abs=1e-10)
    batch = Batch(input_ids=padded, attention_mask=mask)
    again = model.head.scores(out.last_hidden_state, batch)
    torch.testing.assert_close(again, out.scores, rtol=0, atol=0)


def test_the_score_of_a_continued_row_is_that_of_the_whole(build, ids):
    model = build("last", dtype=torch.float64)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, :3] = False
    expected = model(ids, mask).scores
    cache = model.new_cache(3, 12, torch.float64, "cpu")
    model(ids[:, :8], mask[:, :8], cache=cache)
    got = model(ids[:, 8:], mask, cache=cache).scores
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("head", ["last", "likelihood"])
def test_scores_are_normalised_by_stored_mean_and_spread(build, ids, head):
    model = build(head)
    batch = Batch(input_ids=ids, labels=labelled(ids))
    hidden = model(ids).last_hidden_state
    raw = model.head.scores(hidden, batch)
    model.head.reward_mean.fill_(2.0)
    model.head.reward_std.fill_(4.0)
    torch.testing.assert_close(model.head.scores(hidden, batch), (raw - 2) / 4)


def test_a_score_per_row_refuses_packed_rows(build, ids):
    model = build("last")
    segments = torch.ones_like(ids)
    with pytest.raises(ValueError, match="segment_ids"):
        model(ids, segment_ids=segments)
    hidden = model(ids).last_hidden_state
    with pytest.raises(ValueError, match="segment_ids"):
        model.head.scores(hidden, Batch(input_ids=ids, segment_ids=segments))


def test_the_score_weight_starts_with_the_published_spread(build):
    weight = build("last", d_model=1024, n_layers=1).head.weight
    assert weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)


def test_values_start_at_zero_and_learn(build, ids):
    model = build("value")
    out = model(ids)
    assert out.values.shape == (3, 12)
    assert (out.values == 0).all()
    (out.values - 1).square().sum().backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert model.head.bias.grad.item() == pytest.approx(-2 * 36)


@pytest.mark.parametrize("head", ["last", "value"])
def test_scalar_heads_stay_in_float32_under_autocast(build, ids, head):
    model = build(head)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
    assert (out.scores if head == "last" else out.values).dtype == torch.float32
