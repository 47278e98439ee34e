"""Every checkpoint family against transformers: the same numbers, gradients and files, and the same tokens.

A new file in `arch/hf/` is tested here on arrival. That a wrong switch fails is shown in `test_negative_controls.py`.
"""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from distllm import generate
from distllm.arch.hf.family import families
from distllm.arch.io import load_model, save_model
from distllm.testing import parity

transformers = pytest.importorskip("transformers")

FAMILIES = sorted(n for n, f in families().items() if f.arch in ("decoder", "encoder"))
CAUSAL = [n for n in FAMILIES if families()[n].arch == "decoder"]
TOLERANCE = 1e-5
"""Of the largest logit, in float32."""
BF16_ROOM = 1.25
"""Our error in bfloat16 may be so many times the reference's own."""


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(pair, name, side):
    this = pair(name)
    got, expected = this.logits(*parity.padded(this.vocab_size, side))
    assert parity.relative_error(got, expected) <= TOLERANCE
    assert expected.std() > 0.2


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows(pair, name):
    """Documents in one row give what each gives alone."""
    this = pair(name)
    ids, _ = parity.padded(this.vocab_size, "none")
    cuts = [0, 9, 10, parity.SEQ]
    pieces = list(itertools.pairwise(cuts))
    segments = torch.zeros_like(ids)
    for number, (start, end) in enumerate(pieces, start=1):
        segments[:, start:end] = number
    with torch.no_grad():
        got = this.ours(ids, segment_ids=segments).logits
        expected = torch.cat([this.reference(input_ids=ids[:, a:b]).logits for a, b in pieces], 1)
    assert parity.relative_error(got, expected) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_rounds_no_worse(pair, name):
    this = pair(name)
    ids = torch.randint(
        4, this.vocab_size, (16, parity.SEQ), generator=torch.Generator().manual_seed(3)
    )
    errors = {}
    with torch.no_grad():
        exact = this.reference(input_ids=ids).logits
        rounded = getattr(transformers, this.family.architectures[this.head]).from_pretrained(
            this.folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        ours, _ = load_model(this.folder, dtype=torch.bfloat16)
        for who, model in (("theirs", rounded.eval()), ("ours", ours)):
            errors[who] = (model(input_ids=ids).logits.float() - exact).abs().flatten(1)
    # The largest error of one row is a matter of luck; the mean over rows is not.
    worst = {who: e.amax(dim=1).mean() for who, e in errors.items()}
    assert worst["ours"] <= BF16_ROOM * worst["theirs"]
    assert errors["ours"].mean() <= BF16_ROOM * errors["theirs"].mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(pair, name):
    """Both losses are linear in the logits with the same random factors, so every logit counts."""
    this = pair(name)
    ids, mask = parity.padded(this.vocab_size, "right")
    factors = (
        torch.randn(*ids.shape, this.vocab_size, generator=torch.Generator().manual_seed(2))
        * mask[..., None]
        / this.vocab_size
    )
    theirs = parity.gradients(
        (this.reference(input_ids=ids, attention_mask=mask).logits * factors).sum(),
        this.reference,
    )
    ours = parity.gradients((this.ours(ids, mask).logits * factors).sum(), this.ours)
    options = this.ours.options
    translated = {}
    for rule in this.family.rules(options, this.head):
        if all(n in ours for n in rule.ours):
            made = rule.store([ours[n] for n in rule.ours])
            translated |= dict(zip(rule.theirs, made, strict=True))
    theirs = parity.as_on_disk(this.family, theirs)
    assert set(translated) == set(theirs)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for tensor, expected in theirs.items():
        scale = max(float(expected.abs().max()), 1e-3 * largest)
        error = float((translated[tensor] - expected).abs().max())
        assert error <= 1e-4 * scale, tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_files_are_equal(pair, name, tmp_path):
    this = pair(name)
    save_model(this.ours, None, tmp_path / "m")
    before, after = (load_file(f / "model.safetensors") for f in (this.folder, tmp_path / "m"))
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert value.dtype == after[tensor].dtype and torch.equal(value, after[tensor]), tensor
    cls = getattr(transformers, this.family.architectures[this.head])
    loaded, report = cls.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs, ours = this.reference.config.to_dict(), loaded.config.to_dict()
    changed = {
        k: (theirs[k], ours.get(k)) for k in theirs if theirs[k] != ours.get(k) and k not in FREE
    }
    assert changed == {}


FREE = {
    "dtype", "transformers_version", "_name_or_path", "architectures", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",  # of the tokenizer, and there is none
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop",  # we have no such dropout
    "summary_first_dropout", "sliding_window", "max_window_layers", "n_inner",
}  # fmt: skip
"""Settings that may differ without changing what the model computes."""


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens(pair, name):
    this = pair(name)
    ids, mask = parity.padded(this.vocab_size, "left", rows=4)
    ids, mask = ids.repeat(2, 1), mask.repeat(2, 1)
    ids[4:] = torch.where(mask[4:] == 1, ids[:4].flip(1).clamp(min=4), ids[4:])
    with torch.no_grad():
        expected = this.reference.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64,
            do_sample=False, pad_token_id=1, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
    got = generate(this.ours, ids, mask, max_new_tokens=64, temperature=0.0)
    assert got[:, parity.SEQ :].tolist() == expected[:, parity.SEQ :].tolist()
    assert len({tuple(row) for row in got[:, parity.SEQ :].tolist()}) >= 4
