"""Sampling from architectures that are no decoders, against running the whole model again for every token."""

import pytest
import torch

from distllm import generate as generate_tensors
from distllm.arch.encoder import Encoder, EncoderOptions
from distllm.arch.encoder_decoder import EncoderDecoder, EncoderDecoderOptions
from distllm.arch.glm import GLM, GLMOptions
from distllm.arch.lstm import LSTM, LSTMOptions
from distllm.arch.options import Position
from distllm.errors import DataError
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions

SHAPE = {"vocab_size": 41, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "d_ff": 48, "max_seq_len": 40, "init_std": 0.3}  # fmt: skip
MODELS = {
    "t5": lambda: EncoderDecoder(
        EncoderDecoderOptions(**SHAPE, position=Position.relative, relative_buckets=8), seed=2
    ),
    "bart": lambda: EncoderDecoder(
        EncoderDecoderOptions(**SHAPE, position=Position.learned, position_offset=2, decoder_start_id=2),
        seed=2,
    ),
    "glm": lambda: GLM(GLMOptions(**SHAPE, blank_id=38, start_id=39), seed=2),
    "lstm": lambda: LSTM(LSTMOptions(vocab_size=41, d_model=16, d_hidden=24, init_std=0.4), seed=2),
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17]]
END = 3


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


def last_logits(model, prompt, response):
    """Compute the logits behind a response without any cache."""
    batch = model.join([prompt], [[*response, 1]], 0)
    out = model(**batch.inputs())
    return out.logits[0, (batch.labels[0] != -100).nonzero()[-1, 0]]


def test_greedy_tokens_are_those_of_the_whole_model(model):
    options = GenerationOptions(max_new_tokens=14, temperature=0.0)
    found = generate(model, PROMPTS, options, end_ids=[END], pad_id=0)
    for prompt, rollout in zip(PROMPTS, found, strict=True):
        said = []
        while len(said) < 14 and END not in said:
            with torch.no_grad():
                said.append(int(last_logits(model, prompt, said).argmax()))
        assert rollout.response_ids == said


def test_rows_that_end_early_leave_the_others_alone(model):
    """With many samples, rows are dropped on the way; each response's log-probabilities are the model's own."""
    options = GenerationOptions(max_new_tokens=12, temperature=0.8)
    found = generate(model, PROMPTS, options, end_ids=[END, 4, 5, 6], pad_id=0, num_samples=6)
    assert len({len(r.response_ids) for r in found}) > 3
    batch = model.join([r.prompt_ids for r in found], [r.response_ids for r in found], 0)
    with torch.no_grad():
        hidden = model(**batch.inputs(), compute_logits=False).last_hidden_state
        logprobs, _ = model.head.logprobs(hidden, batch.labels, 0.8)
    for row, rollout in enumerate(found):
        own = logprobs[row][batch.labels[row] != -100]
        torch.testing.assert_close(own, rollout.rollout_logprobs, rtol=0, atol=1e-4)


def test_alone_and_together_are_the_same(model):
    options = GenerationOptions(max_new_tokens=9)
    together = generate(model, PROMPTS, options, end_ids=[END], pad_id=0, seed=4)
    for index, prompt in enumerate(PROMPTS):
        (alone,) = generate(
            model, [prompt], options, end_ids=[END], pad_id=0, seed=4, prompt_indices=[index]
        )
        assert alone.response_ids == together[index].response_ids


def test_a_prompt_that_is_too_long_is_named(model):
    longest = {"encoder_decoder": 40, "glm": 37, "lstm": 4095}[model.options.name]
    options = GenerationOptions(max_new_tokens=5)
    (rollout,) = generate(model, [[7] * longest], options, end_ids=[], pad_id=0)
    assert len(rollout.response_ids) == (5 if model.abilities.two_sequences else 1)
    with pytest.raises(DataError, match=rf"prompt 0 has {longest + 1} .* to {longest} tokens"):
        generate(model, [[7] * (longest + 1)], options, end_ids=[], pad_id=0)


def test_tensors_hold_the_target_alone_with_an_encoder():
    model = MODELS["bart"]().eval()
    ids, mask = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    out = generate_tensors(model, ids, mask, max_new_tokens=4, temperature=0.0)
    assert out.shape == (2, 5) and out[:, 0].tolist() == [2, 2]


def test_an_encoder_answers_with_labels():
    """Against the classifier's own distribution: frequencies, log-probabilities, and the greedy label."""
    shape = {k: v for k, v in SHAPE.items() if k != "init_std"}
    model = Encoder(
        EncoderOptions(**shape, num_labels=3, init_std=0.5), head="classify", seed=1
    ).eval()
    texts = [[5, 6, 7, 8], [9, 10]]
    with torch.no_grad():
        expected = torch.stack(
            [torch.log_softmax(model(torch.tensor([t])).logits[0], -1) for t in texts]
        )
    options = GenerationOptions(max_new_tokens=1)
    found = generate(model, texts, options, end_ids=[], pad_id=0, num_samples=2000)
    assert [len(r.response_ids) for r in found] == [1] * 4000
    for row in range(2):
        mine = found[row * 2000 : (row + 1) * 2000]
        for label in range(3):
            share = sum(r.response_ids == [label] for r in mine) / 2000
            p = expected[row, label].exp().item()
            assert abs(share - p) < 4 * (p * (1 - p) / 2000) ** 0.5 + 1e-9
        for r in mine[:20]:
            assert abs(r.rollout_logprobs[0] - expected[row, r.response_ids[0]]) < 1e-5
    greedy = generate(model, texts, GenerationOptions(temperature=0.0), end_ids=[], pad_id=0)
    assert [r.response_ids[0] for r in greedy] == expected.argmax(-1).tolist()
    batch = model.join(texts, [[], []], 0)
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 0] = torch.tensor([2, 1])
    with torch.no_grad():
        hidden = model(**batch.inputs(), compute_logits=False).last_hidden_state
        logprobs, entropy = model.head.logprobs(hidden, labels)
    torch.testing.assert_close(logprobs[:, 0], expected[[0, 1], [2, 1]], rtol=0, atol=1e-5)
    true_entropy = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(entropy[:, 0], true_entropy, rtol=0, atol=1e-5)
    assert logprobs[:, 1:].abs().max() == 0
