"""Rewards: the rule, and reward models against scores computed one response at a time."""

import math

import pytest
import torch
from patched import with_bug

from distllm import registry
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.engines.base import build_engine
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.rl.rewards import model as reward_module
from distllm.types import Prompt, Rollout

VOCAB = 40


def prompt(answer):
    return Prompt(messages=[{"role": "user", "content": "?"}], answer=answer)


def rollout(prompt_ids, response_ids):
    return Rollout(
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        rollout_logprobs=torch.zeros(len(response_ids)),
        finish_reason="stop",
        prompt_index=0,
    )


def ragged(pad_id):
    """Responses of lengths 1 to 9, some made of the padding id itself."""
    noise = torch.Generator().manual_seed(0)

    def draw(size):
        return torch.randint(1, VOCAB, (size,), generator=noise).tolist()

    made = [rollout(draw(1 + 7 * i % 5), draw(1 + i)) for i in range(9)]
    return [*made, rollout([4, pad_id], [pad_id, 3, pad_id]), rollout([pad_id], [pad_id])]


def engine(head):
    options = DecoderOptions(
        vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, init_std=0.3
    )
    model = Decoder(options, head=head, seed=1)
    with torch.no_grad():
        model.head.reward_mean.fill_(0.5)
        model.head.reward_std.fill_(2.0)
    return build_engine(
        "reward",
        model,
        options=EngineOptions(),
        hardware=HardwareOptions(device="cpu"),
        precision="fp32",
    )


def scorer(module, engine, batch_size, pad_id):
    return module.RewardModel(engine, join=engine.model.join, pad_id=pad_id, batch_size=batch_size)


def alone(engine, head, rollout):
    """One unpadded sequence through the bare model; heads written out again."""
    with torch.no_grad():
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        hidden = engine.model(ids, compute_logits=False).last_hidden_state[0]
        if head == "last":
            raw = hidden[-1] @ engine.model.head.weight[0]
        else:
            logprobs = (hidden @ engine.model.embed.weight.T).log_softmax(-1)
            start = len(rollout.prompt_ids)
            raw = sum(logprobs[start - 1 + t, v] for t, v in enumerate(rollout.response_ids))
        return ((raw - 0.5) / 2.0).item()


def check_trap_21_model_scores(module, head):
    """Any batch size, padding, and a padding id that is also a real token: same scores."""
    judge = engine(head)
    for pad_id in (0, 7):
        rollouts = ragged(pad_id)
        expected = [alone(judge, head, r) for r in rollouts]
        assert len({round(score, 4) for score in expected}) == len(rollouts)
        for batch_size in (1, 4, 100):
            scores = scorer(module, judge, batch_size, pad_id).score([], rollouts, [])
            assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("head", ["last", "likelihood"])
def test_item_21_model_scores(head):
    check_trap_21_model_scores(reward_module, head)
    for old, new in [
        ("zip(chosen, verdicts, strict=True)", "zip(chosen[::-1], verdicts, strict=True)"),
        ("zip(chosen, verdicts, strict=True)", "zip(places, verdicts, strict=True)"),
        (
            "self.engine.infer(self._verdicts, batch)",
            "self.engine.infer(self._verdicts, without_mask(batch))",
        ),
    ]:
        if "without_mask" in new and head == "likelihood":
            continue  # right padding is behind everything that counts
        broken = with_bug(reward_module, old, new)
        broken.without_mask = without_mask
        with pytest.raises(AssertionError):
            check_trap_21_model_scores(broken, head)


def without_mask(batch):
    batch.attention_mask = None
    return batch


def test_an_unfinite_score_is_unscorable():
    judge = engine("last")
    with torch.no_grad():
        judge.model.head.weight.fill_(torch.inf)
    scores = scorer(reward_module, judge, 2, 0).score([], ragged(0), [])
    assert all(math.isnan(score) for score in scores)


def test_scoring_leaves_no_gradient_and_no_training_mode():
    judge = engine("last")
    scorer(reward_module, judge, 4, 0).score([], ragged(0), [])
    assert not any(p.requires_grad or p.grad is not None for p in judge.model.parameters())
    assert not judge.model.training
    assert scorer(reward_module, judge, 4, 0).score([], [], []) == []


def test_exact_match_by_hand():
    judge = registry.get("reward", "exact_match")()
    prompts = [prompt("12"), prompt("12"), prompt("12"), prompt("a b"), prompt(None), prompt("")]
    texts = ["12", " 12\n", "112", "a  b", "12", "x"]
    scores = judge.score(prompts, [], texts)
    assert scores[:4] == [1.0, 1.0, 0.0, 0.0] and scores[5] == 0.0
    assert math.isnan(scores[4])


def test_registered_under_their_file_names():
    assert {"exact_match", "model", "function", "http"} <= set(registry.names("reward"))
    assert registry.get("reward", "model") is reward_module.RewardModel
