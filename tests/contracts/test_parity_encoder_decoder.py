"""T5 in its versions, BART and Marian against transformers: numbers, gradients, files; and that wrong switches show."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from distllm import generate
from distllm.arch.encoder_decoder import EncoderDecoder
from distllm.arch.hf.family import families
from distllm.arch.io import load_model, save_model
from distllm.arch.options import Activation, Position
from distllm.testing import parity

transformers = pytest.importorskip("transformers")

V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VARIANTS = {
    "t5": ("t5", {}),
    "t5_v1_1_tied": ("t5", V1_1),
    "t5_v1_1": ("t5", V1_1),
    "bart": ("bart", {}),
    "bart_unscaled": ("bart", {"scale_embedding": False}),
    "marian": ("marian", {}),
}
TOLERANCE, BF16_ROOM = 1e-5, 1.25
T5S = [n for n in VARIANTS if n.startswith("t5")]


class Pair:
    """A model of transformers and ours, read from the directory it was saved to."""

    def __init__(self, name, folder):
        model_type, changes = VARIANTS[name]
        self.family = families()[model_type]
        self.reference = parity.reference(self.family, "lm", **changes)
        if name == "t5_v1_1":  # transformers 5 ties every fresh T5; files of v1.1 hold two matrices
            own = torch.randn(97, 64, generator=torch.Generator().manual_seed(9)) * 0.2
            self.reference.lm_head.weight = torch.nn.Parameter(own)
        self.folder = parity.save(self.reference, folder / name)
        self.ours, _ = load_model(self.folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("families"), {}

    def of(name):
        if name not in made:
            made[name] = Pair(name, folder)
        return made[name]

    return of


def inputs(side="right"):
    """Draw a source and a target, padded; the target's padding is on the right and elsewhere than the source's."""
    ids, mask = parity.padded(96, side)
    target, target_mask = (x.flip(0)[:, :17] for x in parity.padded(96, "right"))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
    }


def error(ours, reference, given):
    real = given["decoder_attention_mask"].bool()
    with torch.no_grad():
        got, expected = (model(**given).logits[real] for model in (ours, reference))
    return parity.relative_error(got, expected)


@pytest.mark.parametrize(
    "name, side",
    [*itertools.product(VARIANTS, ["none", "right"]), *((name, "left") for name in T5S)],
)
def test_logits(pair, name, side):
    this = pair(name)
    assert error(this.ours, this.reference, inputs(side)) <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_rows(pair, name):
    """Pairs in one row, sources and targets of unlike lengths, give what each gives alone."""
    this = pair(name)
    given = inputs("none")
    source, target = given["input_ids"], given["decoder_input_ids"]
    pairs = list(
        zip(itertools.pairwise([0, 9, 10, 22]), itertools.pairwise([0, 3, 12, 16]), strict=True)
    )
    segments, target_segments = torch.zeros_like(source), torch.zeros_like(target)
    for number, ((a, b), (c, d)) in enumerate(pairs, start=1):
        segments[:, a:b] = number
        target_segments[:, c:d] = number
    with torch.no_grad():
        got = this.ours(
            source,
            segment_ids=segments,
            decoder_input_ids=target,
            decoder_segment_ids=target_segments,
        ).logits
        for (a, b), (c, d) in pairs:
            alone = this.reference(
                input_ids=source[:, a:b], decoder_input_ids=target[:, c:d]
            ).logits
            assert parity.relative_error(got[:, c:d], alone) <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients(pair, name):
    this = pair(name)
    given = inputs("right")
    real = given["decoder_attention_mask"].bool()
    factors = torch.randn(int(real.sum()), 97, generator=torch.Generator().manual_seed(2)) / 97
    theirs, found = (
        parity.gradients((model(**given).logits[real] * factors).sum(), model)
        for model in (this.reference, this.ours)
    )
    translated = {}
    for rule in this.family.rules(this.ours.options, "lm"):
        if all(n in found for n in rule.ours):
            made = rule.store([found[n] for n in rule.ours])
            translated |= dict(zip(rule.theirs, made, strict=True))
    assert set(translated) == set(theirs)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for tensor, expected in theirs.items():
        scale = max(float(expected.abs().max()), 2e-3 * largest)
        assert float((translated[tensor] - expected).abs().max()) <= 1e-4 * scale, tensor


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_rounds_no_worse(pair, name):
    this = pair(name)
    generator = torch.Generator().manual_seed(3)
    given = {
        "input_ids": torch.randint(4, 96, (16, parity.SEQ), generator=generator),
        "decoder_input_ids": torch.randint(4, 96, (16, 17), generator=generator),
    }
    with torch.no_grad():
        exact = this.reference(**given).logits
        rounded = type(this.reference).from_pretrained(
            this.folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        ours, _ = load_model(this.folder, dtype=torch.bfloat16)
        theirs, mine = (
            (model.eval()(**given).logits.float() - exact).abs().flatten(1)
            for model in (rounded, ours)
        )
    assert mine.amax(dim=1).mean() <= BF16_ROOM * theirs.amax(dim=1).mean()
    assert mine.mean() <= BF16_ROOM * theirs.mean()


@pytest.mark.parametrize("name", VARIANTS)
def test_exported_files_are_equal(pair, name, tmp_path):
    this = pair(name)
    save_model(this.ours, None, tmp_path / "m")
    before, after = (load_file(f / "model.safetensors") for f in (this.folder, tmp_path / "m"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) == (name == "t5_v1_1")
    for tensor, value in before.items():
        assert value.dtype == after[tensor].dtype and torch.equal(value, after[tensor]), tensor
    loaded, report = type(this.reference).from_pretrained(
        tmp_path / "m", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert error(this.ours, loaded.eval(), inputs()) <= TOLERANCE
    theirs, ours = this.reference.config.to_dict(), loaded.config.to_dict()
    free = {
        "dtype", "transformers_version", "_name_or_path", "architectures", "use_cache", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id", "forced_eos_token_id",
    }  # fmt: skip
    changed = {k for k in theirs if theirs[k] != ours.get(k)} - free
    assert changed == set()
    again, _ = load_model(tmp_path / "m")
    assert replace(again.options, num_labels=3) == replace(this.ours.options, num_labels=3)


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
        assert error(wrong.eval(), this.reference, inputs()) > TOLERANCE, name


def test_the_encoder_may_run_once(pair):
    this = pair("t5")
    given = inputs()
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
    given = inputs("left" if name in T5S else "right")
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


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_tokens(pair, name):
    """64 tokens for a batch of 8, sources padded on the side that the family pads."""
    this = pair(name)
    side = "left" if name in T5S else "right"
    ids, mask = (torch.cat([x, x.flip(0)]) for x in parity.padded(96, side, rows=4))
    ids[4:] = torch.where(mask[4:] == 1, ids[4:].flip(1).clamp(min=4), ids[4:])
    start = this.ours.options.decoder_start_id
    with torch.no_grad():
        expected = this.reference.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False,
            num_beams=1, decoder_start_token_id=start, pad_token_id=1, eos_token_id=None,
            forced_eos_token_id=None, bos_token_id=None,
            use_cache=False,  # its cache takes a T5 decoder to be as deep as the encoder
        )  # fmt: skip
    got = generate(this.ours, ids, mask, max_new_tokens=64, temperature=0.0)
    assert got.tolist() == expected.tolist()
    assert len({tuple(row) for row in got.tolist()}) >= 2
