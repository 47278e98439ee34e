"""What encoder-decoders do beside computing the right numbers: published sizes, layout, no leaks, clear errors."""

import pytest
import torch

from distllm.arch.encoder_decoder import EncoderDecoder, EncoderDecoderOptions
from distllm.config.compose import compose
from distllm.config.footprint import build_meta

TINY = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "d_ff": 48, "init_std": 0.3}  # fmt: skip
SIZES = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "flan_t5_base": 247_577_856,
    "bart_base": 139_420_416,
}
"""As Hugging Face counts the published checkpoints."""


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_their_published_sizes(name):
    model = build_meta(compose([f"arch={name}"], check=False).arch)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


@pytest.mark.parametrize("name, billions", [("glm_2b", 2), ("glm_10b", 10)])
def test_glm_presets_have_the_sizes_in_their_names(name, billions):
    model = build_meta(compose([f"arch={name}"], check=False).arch)
    assert abs(sum(p.numel() for p in model.parameters()) / (billions * 1e9) - 1) < 0.05


@pytest.fixture(scope="module")
def model():
    return EncoderDecoder(EncoderDecoderOptions(**TINY, decoder_start_id=3), seed=1).eval()


def test_join_gives_each_side_its_own(model):
    batch = model.join([[5, 6, 7], [8]], [[10], [12, 13]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.decoder_input_ids.tolist() == [[3, 10, 0], [3, 12, 13]]
    assert batch.labels.tolist() == [[10, -100, -100], [12, 13, -100]]
    assert batch.attention_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.output_mask.tolist() == [[True, True, False], [True] * 3]


def test_a_score_has_seen_the_whole_answer():
    model = EncoderDecoder(EncoderDecoderOptions(**TINY), head="last", seed=1).eval()
    with torch.no_grad():
        scores = [
            model.head.scores(
                model(**(b := model.join([[5, 6]], [answer], 0)).inputs()).last_hidden_state, b
            ).item()
            for answer in ([10, 11], [10, 12])
        ]
        padded = model.join([[5, 6], [7, 8, 9]], [[10, 11], [12, 13, 14]], 0)
        together = model.head.scores(model(**padded.inputs()).last_hidden_state, padded)
    assert abs(scores[0] - scores[1]) > 1e-3
    assert abs(together[0].item() - scores[0]) < 1e-5


def test_packed_pairs_do_not_leak(model):
    """Another pair of the same length in the same row changes no bit, and gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(4, 61, (1, n), generator=generator) for n in (14, 9))
    segments = torch.tensor([[1] * 6 + [2] * 7 + [0]])
    target_segments = torch.tensor([[1] * 4 + [2] * 4 + [0]])
    packing = {"segment_ids": segments, "decoder_segment_ids": target_segments}
    other, other_target = source.clone(), target.clone()
    other[:, :6], other_target[:, :4] = source[:, :6].flip(1), target[:, :4].flip(1)
    with torch.no_grad():
        first = model(source, decoder_input_ids=target, **packing).logits
        second = model(other, decoder_input_ids=other_target, **packing).logits
    assert torch.equal(first[:, 4:8], second[:, 4:8])
    assert not torch.equal(first[:, :4], second[:, :4])
    embedded = model.embed(source).detach().requires_grad_()
    out = model(None, inputs_embeds=embedded, decoder_input_ids=target, **packing)
    (grad,) = torch.autograd.grad(out.logits[:, 4:8].square().sum(), embedded)
    assert grad[:, :6].abs().max() == 0 and grad[:, 6:13].abs().min() > 0


def test_bad_input_is_named(model):
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(ids)
    with pytest.raises(ValueError, match="cannot use prefix_lengths"):
        model(ids, decoder_input_ids=ids, prefix_lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="prompt is empty"):
        model.join([[]], [[1]], 0)
