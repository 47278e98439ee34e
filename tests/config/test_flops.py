"""The count of floating-point operations against torch's counter, which sees the matrix products that really run."""

import dataclasses
import itertools

import pytest
import torch
from patched import with_bug
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distllm import registry
from distllm.arch.decoder import DecoderOptions
from distllm.config import flops as flops_module
from distllm.config.compose import compose
from distllm.config.flops import model_flops
from distllm.config.footprint import build_meta
from distllm.objectives.clm import lm_loss
from distllm.types import IGNORE_INDEX, Batch

SHAPES = {
    "llama": ("decoder", {}),
    "untied": ("decoder", {"tie_embeddings": False, "n_layers": 3}),
    "odd": ("decoder", {"vocab_size": 77, "d_model": 20, "n_layers": 2, "n_heads": 5,
                        "n_kv_heads": 1, "d_head": 6, "d_ff": 36}),
    "gpt": ("decoder", {"gated": False, "activation": "gelu", "norm": "layer",
                        "position": "learned", "n_kv_heads": 4}),
    "bert": ("encoder", {"n_kv_heads": 4, "head_transform": True}),
    "t5": ("encoder_decoder", {"position": "relative", "n_kv_heads": 4}),
    "experts": ("decoder", {"num_experts": 8, "experts_per_token": 2, "d_expert": 96}),
    "glm": ("glm", {}),
}  # fmt: skip


def a_batch(arch, seq=32, target=16):
    ids = torch.zeros(2, seq, dtype=torch.int64)
    ones = torch.ones_like(ids)
    if arch == "encoder_decoder":
        decoder = ids[:, :target]
        return Batch(input_ids=ids, attention_mask=ones, decoder_input_ids=decoder,
                     decoder_attention_mask=torch.ones_like(decoder), labels=decoder)  # fmt: skip
    return Batch(input_ids=ids, attention_mask=ones, labels=ids)


def counted(arch, options, batch):
    """Count the products of one forward, head included, with every token seeing its whole row."""
    model = registry.get("arch", arch)(options)
    # The counter does not know the CPU's fused attention kernel.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model(**batch.inputs())
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SHAPES)
def test_a_forward_costs_what_torch_counts(name):
    arch, switches = SHAPES[name]
    options = registry.get("arch", arch).Options(**switches)
    batch = a_batch(arch)
    expected = counted(arch, options, batch)
    costs = model_flops(build_meta(options))
    assert costs(batch, causal_half=False) / 3 == pytest.approx(expected, rel=1e-9)


def step_by_step(x, start, weights, *_):
    """Compute what torch's fused LSTM does for rows without padding, by products that the counter sees."""
    w_ih, w_hh, bias, _ = weights
    hidden, cell = start[0][0], start[1][0]
    outs = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ w_ih.t() + hidden @ w_hh.t() + bias).chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outs.append(hidden)
    return torch.stack(outs, dim=1), hidden[None], cell[None]


def test_an_lstm_costs_what_torch_counts(monkeypatch):
    options = registry.get("arch", "lstm").Options(d_hidden=48, n_layers=3)
    batch = a_batch("lstm")
    model = registry.get("arch", "lstm")(options)
    whole = model(**batch.inputs()).logits
    monkeypatch.setattr(torch, "lstm", step_by_step)
    torch.testing.assert_close(model(**batch.inputs()).logits, whole)
    expected = counted("lstm", options, batch)
    costs = model_flops(build_meta(options))
    assert costs(batch, causal_half=False) / 3 == pytest.approx(expected, rel=1e-9)


WINDOWED = {
    "sliding decoder": ("decoder", {"layer_types": ["window", "full"], "window": 24}),
    "sliding encoder": ("encoder", {"layer_types": ["full", "window"], "window": 17, "n_kv_heads": 4,
                                    "head_transform": True}),
    "encoder-decoder": ("encoder_decoder", {"position": "relative", "n_kv_heads": 4}),
}  # fmt: skip


def query_by_query(q, k, v, *, mask, **_):
    """Compute what a fused kernel does: the products of pairs that see each other, alone."""
    groups, seen = q.shape[2] // k.shape[2], None
    if mask.bias is not None:
        seen = (mask.bias[0, 0] > -1e9).expand(q.shape[1], k.shape[1])
    outs = torch.zeros_like(q)
    for i in range(q.shape[1]):
        keys = torch.arange(k.shape[1])
        if seen is not None:
            keys = keys[seen[i]]
        elif mask.causal:
            keys = keys[: i + 1]
        for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
            scores = torch.mm(q[b, i : i + 1, h], k[b, keys, h // groups].t())
            outs[b, i, h] = torch.mm(scores.softmax(-1), v[b, keys, h // groups])[0]
    return outs


@pytest.mark.parametrize("name", WINDOWED)
def test_what_a_fused_kernel_computes_is_counted_within_one_percent(name, monkeypatch):
    arch, switches = WINDOWED[name]
    monkeypatch.setattr("distllm.arch.block.attention", query_by_query)
    options = registry.get("arch", arch).Options(d_model=16, n_heads=2, n_kv_heads=2, n_layers=2, d_ff=32, vocab_size=50,
                                                 **{k: v for k, v in switches.items() if k != "n_kv_heads"})  # fmt: skip
    batch = a_batch(arch, seq=96, target=64)
    expected = counted(arch, options, batch)
    costs = model_flops(build_meta(options))
    assert costs(batch, causal_half=True) / 3 == pytest.approx(expected, rel=0.01)
    if "sliding" in name:  # a window counted on one side only, or not at all, is further away
        wrong = [dataclasses.replace(a, window=None) for a in costs.attention]
        broken = dataclasses.replace(costs, attention=tuple(wrong))
        assert broken(batch, causal_half=True) / 3 != pytest.approx(expected, rel=0.01)


def test_a_masked_language_model_pays_for_its_head_where_tokens_are_hidden():
    options = registry.get("arch", "encoder").Options(n_kv_heads=4, head_transform=True)
    batch = a_batch("encoder")
    batch.labels = batch.labels.masked_fill(torch.arange(32) % 7 > 0, IGNORE_INDEX)
    model = registry.get("arch", "encoder")(options)
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        lm_loss(model, batch)
    costs = model_flops(build_meta(options))
    assert costs(batch, causal_half=False) / 3 == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_output_matrix_counted_for_every_embedding_is_noticed():
    arch, switches = SHAPES["untied"]
    options, batch = registry.get("arch", arch).Options(**switches), a_batch(arch)
    broken = with_bug(flops_module, "or id(parameter) in looked_up ", "")
    costs = broken.model_flops(build_meta(options))
    assert costs(batch, causal_half=False) / 3 != pytest.approx(counted(arch, options, batch))


def test_only_labelled_positions_pay_for_the_output_matrix():
    costs = model_flops(build_meta(DecoderOptions()))
    batch = a_batch("decoder")
    whole = costs(batch, causal_half=False)
    batch.labels = batch.labels.masked_fill(torch.arange(32) < 24, IGNORE_INDEX)
    assert whole - costs(batch, causal_half=False) == 6 * 2 * 24 * 4096 * 256


def test_padding_costs_nothing_but_widens_the_row():
    costs = model_flops(build_meta(DecoderOptions()))
    batch = a_batch("decoder")
    batch.attention_mask = (torch.arange(32) < 8).long().expand(2, 32)
    batch.labels = batch.labels.masked_fill(torch.arange(32) >= 8, IGNORE_INDEX)
    assert costs(batch, causal_half=False) == pytest.approx(
        2 * 8 * costs.per_token(32, causal_half=False)
    )


def test_experts_count_as_often_as_a_token_meets_them():
    options = DecoderOptions(num_experts=8, experts_per_token=2, d_expert=96, n_layers=1)
    dense = model_flops(build_meta(DecoderOptions(n_layers=1, d_ff=2 * 96)))
    router = 8 * 256
    assert model_flops(build_meta(options)).multiplied == dense.multiplied + router


def test_the_conventions_differ_by_half_of_the_attention():
    costs = model_flops(build_meta(DecoderOptions()))
    full, half = (costs.per_token(256, causal_half=c) for c in (False, True))
    assert full - half == 6 * 4 * 256 * 256  # 6 x n_layers x seq_len x width
    assert half - 6 * 4 * 256 * 256 == 6 * costs.multiplied


def test_a_window_limits_what_is_seen():
    options = DecoderOptions(layer_types=["window"], window=64)
    costs, wide = model_flops(build_meta(options)), model_flops(build_meta(DecoderOptions()))
    assert costs.per_token(256, causal_half=False) < wide.per_token(256, causal_half=False)
    assert costs.per_token(64, causal_half=False) == wide.per_token(64, causal_half=False)
    queries = torch.arange(256)
    visible = (queries[:, None] >= queries) & (queries[:, None] - queries < 64)
    seen = costs.attention[0].keys(256, causal_half=True)
    assert seen == pytest.approx(visible.sum().item() / 256, rel=0.01)


def test_an_8b_model_costs_what_its_users_publish():
    """57.9 and 51.5 GFLOP per token at 8,192 tokens: torchtitan's and Megatron's count of the same model."""
    costs = model_flops(build_meta(compose(["arch=llama3_8b"]).arch))
    assert costs.per_token(8192, causal_half=False) / 1e9 == pytest.approx(57.9, abs=0.05)
    assert costs.per_token(8192, causal_half=True) / 1e9 == pytest.approx(51.5, abs=0.05)
