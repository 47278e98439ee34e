"""Batched sampling with a cache against transformers, itself alone, and full forwards."""

import inspect
from collections import Counter

import numpy as np
import pytest
import torch
from patched import with_bug

from distllm.arch import decoder, reading
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.io import load_model
from distllm.errors import ConfigError, DataError, EngineError
from distllm.generation import decoding
from distllm.generation import generate as ours
from distllm.generation.options import GenerationOptions

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [3], [40, 41], [9, 9, 9, 9, 9], [50, 4, 31]]


def tiny(**changes):
    """A model whose wide initial weights make peaked, varied distributions."""
    shape = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    shape |= {"d_ff": 48, "max_seq_len": 64, "init_std": 0.25}
    seed = changes.pop("seed", 0)
    return Decoder(DecoderOptions(**(shape | changes)), seed=seed).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def run(
    model, prompts=PROMPTS, module=ours, end_ids=(), num_samples=1, seed=0, indices=None, **options
):
    settings = GenerationOptions(**({"max_new_tokens": 24} | options))
    return module.generate(
        model,
        prompts,
        settings,
        end_ids=end_ids,
        pad_id=0,
        seed=seed,
        num_samples=num_samples,
        prompt_indices=indices,
    )


def broken(old, new):
    """`generate.py` over a `decoding.py` with a bug, or over a decoder that reads with one, until the test ends."""
    module = with_bug(ours, "import Decoding\n", "import Decoding\n")
    _PATCHES.undo()
    if old in inspect.getsource(reading):
        _PATCHES.setattr(decoder, "Reading", with_bug(reading, old, new).Reading)
    else:
        module.Decoding = with_bug(decoding, old, new).Decoding
    return module


_PATCHES = pytest.MonkeyPatch()


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    _PATCHES.undo()


def ids(rollouts):
    return [r.response_ids for r in rollouts]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama made and saved by transformers, and ours loaded from the same files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)[0]


def transformers_greedy(theirs, prompts, max_new_tokens, end_ids=None):
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = theirs.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=0,
    )
    return out[:, width:].tolist()


def check_greedy_equals_transformers(module, llama):
    """Batch of 8 with left padding, 64 tokens."""
    theirs, mine = llama
    noise = np.random.default_rng(1)
    prompts = [noise.integers(1, 128, size=n).tolist() for n in (1, 2, 3, 5, 8, 13, 21, 34)]
    expected = transformers_greedy(theirs, prompts, 64)
    assert all(len(set(row)) > 5 for row in expected), "a constant answer would show little"
    rollouts = run(mine, prompts, module, temperature=0.0, max_new_tokens=64)
    assert ids(rollouts) == expected
    assert {r.finish_reason for r in rollouts} == {"length"}


def test_greedy_equals_transformers(llama):
    check_greedy_equals_transformers(ours, llama)
    for old, new in [
        (
            "(self.cache.length - self.pads)[:, None]",
            "(self.cache.length + 0 * self.pads)[:, None]",
        ),
        ("[pad_id] * (width - len(p)) + list(p)", "list(p) + [pad_id] * (width - len(p))"),
        ("if self.any_pad:", "if False:"),
    ]:
        with pytest.raises(AssertionError):
            check_greedy_equals_transformers(broken(old, new), llama)


def test_end_tokens_equal_transformers(llama):
    """The end token is kept, and what transformers pads with is not."""
    theirs, mine = llama
    prompts = [[i, i + 1] for i in range(1, 17, 2)]
    free = transformers_greedy(theirs, prompts, 32)
    end_ids = [token for token, _ in Counter(t for row in free for t in row[3:]).most_common(6)]
    rollouts = run(mine, prompts, end_ids=end_ids, temperature=0.0, max_new_tokens=32)
    expected = transformers_greedy(theirs, prompts, 32, end_ids)
    assert len({len(r.response_ids) for r in rollouts}) > 3
    for rollout, row in zip(rollouts, expected, strict=True):
        length = len(rollout.response_ids)
        assert rollout.response_ids == row[:length]
        assert set(row[length:]) <= {0}
        ended = rollout.response_ids[-1] in end_ids
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert not set(rollout.response_ids[:-1]) & set(end_ids)


def check_batch_composition(module, model):
    """A response is the same alone, in another order and beside others that end sooner."""
    whole = run(model, module=module, num_samples=4, end_ids=[1, 2, 3, 4, 5, 6], seed=3)
    assert [(r.prompt_index, r.sample_index) for r in whole] == [
        (p, s) for p in range(len(PROMPTS)) for s in range(4)
    ]
    assert len(set(map(tuple, ids(whole)))) > 15, "samples of one prompt must differ"
    for index, prompt in enumerate(PROMPTS):
        alone = run(
            model,
            [prompt],
            module,
            num_samples=2,
            end_ids=[1, 2, 3, 4, 5, 6],
            seed=3,
            indices=[index],
        )
        assert ids(alone) == ids(whole[4 * index : 4 * index + 2])
        for a, b in zip(alone, whole[4 * index :], strict=False):
            torch.testing.assert_close(a.rollout_logprobs, b.rollout_logprobs, rtol=0, atol=1e-5)
    backwards = list(range(len(PROMPTS)))[::-1]
    turned = run(
        model,
        PROMPTS[::-1],
        module,
        num_samples=4,
        end_ids=[1, 2, 3, 4, 5, 6],
        seed=3,
        indices=backwards,
    )
    assert {(r.prompt_index, r.sample_index, *r.response_ids) for r in turned} == {
        (r.prompt_index, r.sample_index, *r.response_ids) for r in whole
    }


def test_batch_composition(model):
    check_batch_composition(ours, model)
    for old, new in [
        ("self.noise[self.rows, position]", "self.noise[: len(self.rows), position]"),
        (
            "[index for index in prompt_indices for",
            "[index for index in range(len(prompt_indices)) for",
        ),
        ("list(range(num_samples)) * len(prompt_ids)", "[0] * num_samples * len(prompt_ids)"),
    ]:
        with pytest.raises(AssertionError):
            check_batch_composition(broken(old, new), model)


def test_seed_decides(model):
    assert ids(run(model, seed=1)) == ids(run(model, seed=1))
    assert ids(run(model, seed=1)) != ids(run(model, seed=2))


EARLY = PROMPTS[:1] + PROMPTS[1:] * 7


def check_compaction(module, model, monkeypatch):
    """Never, always and by the rule dropping finished rows gives the same responses."""
    results = []
    for fraction in (1.1, 0.0, 0.25):
        rules = module.Decoding.step.__globals__
        monkeypatch.setitem(rules, "COMPACT_FRACTION", fraction)
        results.append(run(model, EARLY, module, end_ids=[1, 2, 3, 4, 5, 6], seed=2))
    for other in results[1:]:
        assert ids(other) == ids(results[0])
        assert [r.finish_reason for r in other] == [r.finish_reason for r in results[0]]
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a.rollout_logprobs, b.rollout_logprobs, rtol=0, atol=1e-5)


def test_compaction(model, monkeypatch):
    lengths = [len(r) for r in ids(run(model, EARLY, end_ids=[1, 2, 3, 4, 5, 6], seed=2))]
    assert len(set(lengths)) > 8
    assert lengths[0] < 10, "the longest prompt must leave early, so that padding is cut off"
    check_compaction(ours, model, monkeypatch)
    for old, new in [
        ("self.pads = self.pads - margin", "pass"),
        ("self.cache.drop_columns(margin)", "pass"),
        ("self.cache = self.cache.select(rows)", "self.cache = self.cache.select(rows.flip(0))"),
        (
            "self.rows, self.done = self.rows[kept],",
            "self.rows, self.done = self.rows[: len(kept)],",
        ),
        (
            "finished = (ended | (self.limits[self.rows] == self.num_steps)) & ~self.done",
            "finished = ended | (self.limits[self.rows] == self.num_steps)",
        ),
    ]:
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            check_compaction(broken(old, new), model, monkeypatch)


def test_finished_rows_leave_the_batch(model):
    """Measured in rows computed: with early ends, far fewer than rows x steps."""
    rows = []
    handle = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        rollouts = run(model, num_samples=8, end_ids=list(range(1, 13)), max_new_tokens=50)
    finally:
        handle.remove()
    assert rows[0] == len(PROMPTS), "each prompt is computed once, not once per sample"
    needed = sum(len(r.response_ids) - 1 for r in rollouts)
    assert sum(rows[1:]) <= 1.5 * needed + 8
    assert len(rows) == max(len(r.response_ids) for r in rollouts)


def full_forward_logprobs(model, rollout, temperature=1.0):
    """Log-softmax of a forward over the sequence, without cache or padding: `[response, vocab]`."""
    sequence = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with torch.no_grad():
        logits = model(sequence).logits[0].double()
    start = len(rollout.prompt_ids) - 1
    return torch.log_softmax(logits[start:-1] / temperature, dim=-1)


def check_logprobs(module, model):
    """What is reported is the distribution drawn from, recomputed by a full forward."""
    for settings in (
        {},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.2, "top_k": 9, "top_p": 0.7},
    ):
        for rollout in run(model, module=module, num_samples=3, end_ids=[1, 2], seed=9, **settings):
            table = full_forward_logprobs(model, rollout, settings.get("temperature", 1.0))
            probs = table.exp()
            if k := settings.get("top_k"):
                edge = probs.sort(dim=1, descending=True).values[:, k - 1 : k]
                probs = torch.where(probs >= edge, probs, 0.0)
                probs = probs / probs.sum(dim=1, keepdim=True)
            if p := settings.get("top_p"):
                for row in probs:
                    ordered = row.sort(descending=True)
                    size = int((ordered.values.cumsum(0) < p).sum()) + 1
                    row[ordered.indices[size:]] = 0.0
                probs = probs / probs.sum(dim=1, keepdim=True)
            picked = probs.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0].log()
            assert rollout.rollout_logprobs.dtype == torch.float32
            torch.testing.assert_close(rollout.rollout_logprobs.double(), picked, rtol=0, atol=1e-4)


def test_item_29_logprobs_are_of_the_distribution_that_was_drawn_from(model, monkeypatch):
    check_logprobs(ours, model)
    for old, new in [
        (
            "self.logprobs[self.rows, position] = logprobs",
            "self.logprobs[self.rows, position] = "
            "torch.log_softmax(self.logits, -1).gather(1, tokens[:, None])[:, 0]",
        ),
        (
            "self.tokens[self.rows, position] = tokens",
            "self.tokens[self.rows, position] = (tokens + 1) % 64",
        ),
        ("logprobs[row, : lengths[row]].clone()", "logprobs[row, : lengths[row]].roll(1)"),
    ]:
        with pytest.raises(AssertionError):
            check_logprobs(broken(old, new), model)


def test_logprobs_equal_the_training_path(model):
    """Through `join` and `head.logprobs`, as RL recomputes them."""
    rollouts = run(model, num_samples=2, end_ids=[1, 2, 3], temperature=0.8)
    batch = model.join([r.prompt_ids for r in rollouts], ids(rollouts), 0)
    with torch.no_grad():
        hidden = model(
            batch.input_ids, batch.attention_mask, compute_logits=False
        ).last_hidden_state
        logprobs, _ = model.head.logprobs(hidden, batch.labels, 0.8)
    for row, rollout in enumerate(rollouts):
        found = logprobs[row][batch.labels[row] != -100]
        torch.testing.assert_close(found, rollout.rollout_logprobs, rtol=0, atol=1e-4)


def test_context_limit(model):
    """Rows run into the model's context one by one; each is as long as when it runs alone."""
    prompts = [list(range(1, 1 + n)) for n in (63, 60, 59, 30, 2)]
    rollouts = run(model, prompts, max_new_tokens=200, num_samples=2, seed=5)
    lengths = [len(r.response_ids) for r in rollouts]
    assert lengths == [1, 1, 4, 4, 5, 5, 34, 34, 62, 62]
    assert {r.finish_reason for r in rollouts} == {"length"}
    for index, prompt in enumerate(prompts):
        alone = run(model, [prompt], max_new_tokens=200, num_samples=2, seed=5, indices=[index])
        assert ids(alone) == ids(rollouts[2 * index : 2 * index + 2])


def test_prompts_that_do_not_fit(model):
    with pytest.raises(DataError, match=r"prompt 1 has 64 tokens, .* at most 64.* to 63 tokens"):
        run(model, [[1, 2], [1] * 64])
    with pytest.raises(DataError, match="prompt 7 is empty"):
        run(model, [[]], indices=[7])
    with pytest.raises(ConfigError, match="num_samples=0 must be at least 1"):
        run(model, num_samples=0)
    assert run(model, []) == []


def test_stop_strings(model):
    """A response ends with the token that completes the text, wherever token borders fall."""

    def decode(tokens):
        return "".join("abcdefgh"[t % 8] for t in tokens)

    options = GenerationOptions(max_new_tokens=60, stop=["hag", "cc"])
    rollouts = ours.generate(
        model, PROMPTS, options, end_ids=[], pad_id=0, num_samples=8, decode=decode
    )
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert len(stopped) > 10
    for rollout in rollouts:
        text = decode(rollout.response_ids)
        found = text.endswith(("hag", "cc"))
        assert found == (rollout.finish_reason == "stop")
        assert "hag" not in text[:-1] and "cc" not in text[:-1]
    with pytest.raises(
        ConfigError, match=r"generation.stop=\['hag', 'cc'\] can only be found in text"
    ):
        ours.generate(model, PROMPTS, options, end_ids=[], pad_id=0)


def test_nan_logits_are_an_error(model):
    damaged = tiny()
    with torch.no_grad():
        damaged.final_norm.weight[3] = torch.nan
    with pytest.raises(EngineError, match="NaN or infinite at response token 0 of prompt 20"):
        run(damaged, [[1, 2]], indices=[20])
    for _ in run(model):
        pass


def test_model_is_left_as_it_was():
    """Dropout is off inside and on again after; no gradient graph, no global generator moves."""
    wild = tiny(dropout=0.5).train()
    wild.layers[0].eval()
    before = torch.get_rng_state()
    rollouts = run(wild, num_samples=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert wild.training and wild.layers[1].training and not wild.layers[0].training
    assert ids(rollouts) == ids(run(tiny(), num_samples=2))
    assert not rollouts[0].rollout_logprobs.requires_grad
    assert torch.is_grad_enabled()


def test_stream_yields_what_generate_returns(model):
    options = GenerationOptions(max_new_tokens=30, temperature=0.9)
    for seed in range(4):
        (whole,) = ours.generate(
            model, [PROMPTS[0]], options, end_ids=[1, 2, 3], pad_id=0, seed=seed
        )
        pieces = ours.stream(model, PROMPTS[0], options, end_ids=[1, 2, 3], pad_id=0, seed=seed)
        got = []
        for token in pieces:
            assert torch.is_grad_enabled(), "a suspended stream must not change its caller's mode"
            got.append(token)
        assert got == whole.response_ids


def test_repetition_penalty_equals_transformers(llama):
    """Greedy, so that the tokens say it all; prompts of uneven lengths, penalised for what each row itself holds."""
    theirs, mine = llama
    prompts = [[3, 9, 4, 11], [7, 5]]

    def respond(penalty):
        options = GenerationOptions(max_new_tokens=24, temperature=0.0, repetition_penalty=penalty)
        rollouts = ours.generate(mine, prompts, options, end_ids=[], pad_id=0, num_samples=2)
        return ids(rollouts)

    expected = [
        theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            repetition_penalty=1.8,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
        for _ in range(2)
    ]
    assert respond(1.8) == expected
    assert respond(1.0) != expected
