"""A world small enough to enumerate: every response, its probability, and every expectation, exactly and in fp64.

Vocabulary 3, responses of at most 3 tokens (15 of them, 225 pairs). The policy is a table with one row of logits per
prefix, so it can be any policy. `World` computes in numpy, with softmax gradients written out by hand; `expected_gradient`
runs the real algorithm, objective and engine on every group of responses and weighs each by its probability. The
padding id is the end token.
"""

import itertools

import numpy as np
import torch
from torch import nn

from distllm.arch.decoder import DecoderOptions
from distllm.arch.heads import LMHead, ValueHead
from distllm.testing.rl import make_algorithm
from distllm.testing.tiny import single_engine, tiny_decoder
from distllm.types import ModelOutput, Rollout, sum_by_key

VOCAB, LENGTH, END = 3, 3, 0
PROMPT = [1]
ROWS = (VOCAB + 1) ** (LENGTH + 2)


class Table(nn.Module):
    """A model whose hidden state is a table's row for the tokens so far."""

    def __init__(self, head="lm", seed=0, scale=1.0):
        super().__init__()
        width = VOCAB if head == "lm" else 1
        noise = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(
            scale * torch.randn(ROWS, width, generator=noise, dtype=torch.float64)
        )
        self.options = DecoderOptions(vocab_size=VOCAB, d_model=width, n_heads=1, n_kv_heads=1, d_head=2)  # fmt: skip
        self.head = LMHead(self.options, None) if head == "lm" else ValueHead(self.options, None)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.eye(width) if parameter.ndim == 2 else torch.zeros(1))
        self.head.double().requires_grad_(False)
        self.join = tiny_decoder().join

    def forward(self, input_ids, attention_mask=None, compute_logits=False, **_):
        rows = [torch.zeros_like(input_ids[:, 0])]
        for token in input_ids.unbind(1):
            rows.append((rows[-1] * (VOCAB + 1) + token + 1) % ROWS)
        return ModelOutput(last_hidden_state=self.table[torch.stack(rows[1:], 1)])

    def blocks(self):
        return []


def row_of(prefix):
    row = 0
    for token in (*PROMPT, *prefix):
        row = (row * (VOCAB + 1) + token + 1) % ROWS
    return row


def responses():
    """List every response: up to LENGTH tokens, ended by END or by the budget."""
    found = []
    for size in range(LENGTH):
        found += [(*body, END) for body in itertools.product(range(1, VOCAB), repeat=size)]
    return found + list(itertools.product(range(1, VOCAB), repeat=LENGTH))


RESPONSES = responses()


class World:
    """One policy as numpy: probabilities, gradients of log-probabilities, expectations."""

    def __init__(self, table):
        self.logits = table.table.detach().numpy()

    def distribution(self, prefix):
        logits = self.logits[row_of(prefix)]
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    def logprobs(self, response):
        return np.log([self.distribution(response[:t])[v] for t, v in enumerate(response)])

    def probability(self, response):
        return float(np.exp(self.logprobs(response).sum()))

    def token_gradients(self, response):
        """d log pi(token t | prefix) / d table, [tokens, rows, vocab]: one-hot minus softmax in the prefix's row."""
        out = np.zeros((len(response), ROWS, VOCAB))
        for t, token in enumerate(response):
            out[t, row_of(response[:t])] = np.eye(VOCAB)[token] - self.distribution(response[:t])
        return out

    def score_function(self, response):
        return self.token_gradients(response).sum(axis=0)

    def expect(self, function):
        """E[function(response)] under this policy."""
        return sum(self.probability(r) * function(r) for r in RESPONSES)

    def objective_gradient(self, reward):
        """d E[reward] / d table, exactly."""
        return self.expect(lambda r: reward(r) * self.score_function(r))

    def prefixes(self):
        """Yield (prefix, probability of coming to it) for all prefixes that a token follows."""
        for size in range(LENGTH):
            for prefix in itertools.product(range(1, VOCAB), repeat=size):
                yield prefix, float(np.exp(self.logprobs(prefix).sum())) if prefix else 1.0

    def value(self, reward, prefix):
        """V(prefix) = E[reward | prefix]."""
        going_on = [r for r in RESPONSES if r[: len(prefix)] == tuple(prefix)]
        mass = sum(self.probability(r) for r in going_on)
        return sum(self.probability(r) * reward(r) for r in going_on) / mass


def reward(response):
    """A reward with a different value for almost every response, so that nothing cancels by accident."""
    return sum((t + 1) * (v + 0.3) ** 2 for t, v in enumerate(response)) / 7 - 0.4 * len(response)


def make(algorithm, policy, reference=None, value=None, **options):
    """Build the algorithm and its engines."""
    made = make_algorithm(
        algorithm, policy, batch_size=10_000, max_response_tokens=LENGTH, pad_id=END, **options
    )
    engines = {"policy": single_engine(policy)}
    if reference is not None:
        engines["reference"] = single_engine(reference, trained=False)
    if value is not None:
        engines["value"] = single_engine(value)
    return made, engines


def rollout_of(response, sampler, index=0, reward=reward, baseline=0.0):
    return Rollout(
        prompt_ids=list(PROMPT),
        response_ids=list(response),
        rollout_logprobs=torch.from_numpy(sampler.logprobs(response)),
        finish_reason="stop" if response[-1] == END else "length",
        prompt_index=index,
        score=reward(response),
        reward=reward(response),
        baseline=baseline,
    )


def groups(sampler, size, **fields):
    """Yield (probability, rollouts) for every ordered group of `size` responses."""
    for index, group in enumerate(itertools.product(RESPONSES, repeat=size)):
        mass = float(np.prod([sampler.probability(r) for r in group]))
        yield mass, [rollout_of(r, sampler, index, **fields) for r in group]


def expected_gradient(
    algorithm,
    engines,
    sampler,
    size=2,
    *,
    role="policy",
    whole=False,
    move=None,
    shape=None,
    **fields,
):
    """E[gradient of the loss] over every group that `sampler` may draw, [rows, vocab].

    Args:
        algorithm: the real one.
        engines: by role.
        sampler: a `World`; responses are drawn from it.
        size: responses in a batch, all to one prompt.
        role: whose gradient.
        whole: prepare each group as a batch of its own (algorithms that whiten over the batch).
        shape: called with each batch before `prepare`, to make rewards of scores.
        move: called once between `prepare` and the losses (the policy moves away from the one that sampled).
    """
    drawn = list(groups(sampler, size, **fields))
    together = [[r for _, rollouts in drawn for r in rollouts]]
    for rollouts in [rollouts for _, rollouts in drawn] if whole else together:
        if shape is not None:
            shape(rollouts)
        algorithm.prepare(rollouts, engines)
    if move is not None:
        move()
    engine, objective = engines[role], algorithm.objectives()[role]
    for mass, rollouts in drawn:
        batch = objective.collate(rollouts)
        totals = sum_by_key([objective.weights(batch)])
        engine.forward_backward(objective, [batch], {k: v / mass for k, v in totals.items()})
    gradient = engine.model.table.grad.numpy().copy()
    engine.discard()
    return gradient
