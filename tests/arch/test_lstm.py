"""LSTM against torch.nn.LSTM, whatever the padding and packing; its dropouts; its published size."""

import pytest
import torch

from distllm import generate
from distllm.arch.io import load_model, save_model
from distllm.arch.lstm import LSTM, LSTMOptions
from distllm.config.footprint import build_meta

TINY = {"vocab_size": 41, "d_model": 12, "d_hidden": 20, "n_layers": 3, "init_std": 0.4}


def build(**changes):
    return LSTM(LSTMOptions(**(TINY | changes)), seed=3)


@pytest.fixture(scope="module")
def ours():
    return build().eval()


@pytest.fixture(scope="module")
def reference(ours):
    """Return a function from ids to logits, made of torch's own layers."""
    layers = []
    for layer in ours.layers:
        cell = torch.nn.LSTM(layer.weight_ih.shape[1], layer.d_out, batch_first=True)
        with torch.no_grad():
            cell.weight_ih_l0.copy_(layer.weight_ih)
            cell.weight_hh_l0.copy_(layer.weight_hh)
            cell.bias_ih_l0.copy_(layer.bias)
            cell.bias_hh_l0.zero_()
        layers.append(cell)

    def run(ids):
        x = ours.embed(ids)
        for cell in layers:
            x, _ = cell(x)
        return x @ ours.embed.weight.t()

    return run


def draw(rows, length, seed=0):
    return torch.randint(1, 41, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_it_is_torchs_lstm(ours, reference):
    ids = draw(3, 11)
    torch.testing.assert_close(ours(ids).logits, reference(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(ours, reference, side):
    lengths = [11, 4, 1]
    ids, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.bool)
    for row, n in enumerate(lengths):
        at = slice(11 - n, 11) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = draw(1, n, row)[0], True
    got = ours(ids, mask).logits
    for row in range(3):
        alone = reference(ids[row : row + 1][:, mask[row]])[0]
        torch.testing.assert_close(got[row][mask[row]], alone, rtol=0, atol=1e-6)


def test_packed_segments_are_strangers(ours, reference):
    ids = draw(2, 12)
    segments = torch.tensor([[1] * 5 + [2] * 1 + [3] * 6, [1] * 7 + [2] * 2 + [0] * 3])
    got = ours(ids, segment_ids=segments).logits
    for row in range(2):
        for number in range(1, int(segments[row].max()) + 1):
            own = segments[row] == number
            alone = reference(ids[row : row + 1][:, own])[0]
            torch.testing.assert_close(got[row][own], alone, rtol=0, atol=1e-6)
    grad = torch.autograd.grad(
        ours(
            None,
            inputs_embeds=(e := ours.embed(ids).detach().requires_grad_()),
            segment_ids=segments,
        )
        .logits[0, 6:]
        .square()
        .sum(),
        e,
    )[0]
    assert grad[0, :6].abs().max() == 0 and grad[0, 6:].abs().min() > 0


def test_a_cache_goes_on_where_it_stopped(ours, reference):
    ids, mask = draw(3, 9), torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False
    expected = [reference(ids[r : r + 1][:, mask[r]])[0, -1] for r in range(3)]
    cache = ours.new_cache(3, 9, torch.float32, "cpu")
    ours(ids[:, :6], mask[:, :6], cache=cache)
    assert cache.length == 6
    cache = cache.select(torch.tensor([1, 2])).repeat(2)
    rows = torch.tensor([1, 1, 2, 2])
    for t in range(6, 9):
        out = ours(ids[rows, t : t + 1], mask[rows, : t + 1], cache=cache)
    for got, row in zip(out.logits[:, -1], rows, strict=True):
        torch.testing.assert_close(got, expected[row], rtol=0, atol=1e-6)


def test_greedy_generation_is_a_loop_over_the_model(ours, reference):
    ids, mask = draw(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[0, :3] = False
    got = generate(ours, ids, mask, max_new_tokens=12, temperature=0.0)
    for row in range(3):
        text = ids[row][mask[row]][None]
        for _ in range(12):
            text = torch.cat([text, reference(text)[:, -1:].argmax(-1)], dim=1)
        assert got[row, 6:].tolist() == text[0, -12:].tolist()


def test_dropouts_take_whole_things():
    ids = draw(4, 7)
    model = build(dropout=0.5, n_layers=1).train()
    zeros = model(ids).last_hidden_state == 0
    assert bool((zeros.all(dim=1) | ~zeros.any(dim=1)).all())
    assert 0.2 < zeros.float().mean() < 0.8
    words = build(dropout_embedding=0.5).train()
    torch.manual_seed(0)
    looked_up = words._embed(torch.arange(41)[None].expand(2, -1), None)
    gone = (looked_up == 0).all(dim=-1)
    assert torch.equal(gone[0], gone[1]) and 8 < int(gone[0].sum()) < 33
    weights = build(dropout_weights=0.5).train()
    first, second = (weights(ids).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    weights(ids).last_hidden_state.square().sum().backward()
    assert torch.equal(weights.eval()(ids).last_hidden_state, weights(ids).last_hidden_state)


def test_it_is_saved_and_read(ours, tmp_path):
    save_model(ours, None, tmp_path / "m")
    again, _ = load_model(tmp_path / "m")
    ids = draw(2, 5)
    assert again.options == ours.options and torch.equal(again(ids).logits, ours(ids).logits)


def test_awd_lstm_has_its_published_size():
    """Merity et al. 2017: three layers, 1150 wide, embeddings of 400, 33 million for WikiText-2's 33,278 words."""
    model = build_meta(LSTMOptions(vocab_size=33278, d_model=400, d_hidden=1150, n_layers=3))
    assert 33.4e6 < sum(p.numel() for p in model.parameters()) < 33.6e6
