"""T5 in its versions, BART and Marian: wrong switches show, the encoder may run once, a cache changes nothing."""

from dataclasses import replace

import pytest
import torch

from distllm.arch.encoder_decoder import EncoderDecoder
from distllm.arch.options import Activation, Position
from distllm.testing import parity
from distllm.testing.pairs import TOLERANCE

T5S = ["t5", "t5_v1_1", "t5_v1_1_tied"]

WRONG = {
    "scores scaled": (T5S, {"attention_scale": None}),
    "outputs not scaled": (["t5"], {"logit_scale": 1.0}),
    "outputs scaled": (["t5_v1_1"], {"logit_scale": 64**-0.5}),
    "longer buckets": (T5S, {"relative_max_distance": 18}),
    "no positions": (["marian", *T5S], {"position": Position.none}),
    "exact gelu": (["t5_v1_1"], {"activation": Activation.gelu}),
    "tanh gelu": (["bart"], {"activation": Activation.gelu_tanh}),
    "eps": (["t5"], {"norm_eps": 1e-5}),
    "positions from row 0": (["bart"], {"position_offset": 0, "max_seq_len": 162}),
    "embeddings not scaled": (["bart", "marian"], {"embedding_scale": 1.0}),
    "embeddings scaled": (["bart_unscaled"], {"embedding_scale": 8.0}),
    "embeddings not normalised": (["bart"], {"embedding_norm": False}),
    "no bias behind the output matrix": (["bart", "marian"], {"head_bias": False}),
    "tied": (["t5_v1_1"], {"tie_embeddings": True}),
    "eps of layer norms": (["bart", "marian"], {"norm_eps": 1e-4}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_switch_shows(pair, what):
    names, changes = WRONG[what]
    for name in names:
        this = pair(name)
        wrong = EncoderDecoder(replace(this.ours.options, **changes))
        missing = wrong.load_state_dict(this.ours.state_dict(), strict=False).missing_keys
        assert not missing
        assert this.logits_error("right", wrong.eval()) > TOLERANCE, name


def test_the_encoder_may_run_once(pair):
    this = pair("t5")
    given = this.inputs("right")
    source = {k: given.pop(k) for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        whole = this.ours(**source, **given)
        split = this.ours(
            encoder_states=whole.encoder_states,
            attention_mask=source["attention_mask"],
            **given,
        )
    assert torch.equal(whole.logits, split.logits)


@pytest.mark.parametrize("name", ["t5", "t5_v1_1", "bart", "marian"])
def test_a_cache_gives_the_same(pair, name):
    """Token by token, rows dropped and repeated on the way, against all at once."""
    this = pair(name)
    given = this.inputs(this.sides[-1])
    target = given["decoder_input_ids"]
    del given["decoder_attention_mask"]
    with torch.no_grad():
        whole = this.ours(**given).logits
        cache = this.ours.new_cache(3, 17, torch.float32, "cpu")
        source = {k: given[k] for k in ("input_ids", "attention_mask")}
        got = this.ours(**source, decoder_input_ids=target[:, :2], cache=cache).logits
        rows = torch.tensor([2, 0])
        cache = cache.select(rows).repeat(2)
        rows = rows.repeat_interleave(2)
        assert parity.relative_error(got, whole[:, :2]) <= TOLERANCE
        for t in range(2, 17):
            got = this.ours(decoder_input_ids=target[rows, t : t + 1], cache=cache).logits
            assert parity.relative_error(got[:, 0], whole[rows, t]) <= TOLERANCE
