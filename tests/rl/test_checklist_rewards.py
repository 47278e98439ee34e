"""Checklist, items 12 to 26: how losses are normalised, and what becomes of rewards."""

import math
from types import SimpleNamespace

import pytest
import torch
from checklist import holds_and_notices, noticed
from patched import with_bug
from recorded import case, gradients, largest_difference, recorded
from test_advantages import check_trap_17_zero_spread, check_trap_18_unscorable
from test_rewards import check_trap_21_model_scores

from distllm import registry
from distllm.arch import pooling, verdict_heads
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.config.compose import compose
from distllm.data.packing import PackedDataset
from distllm.data.tokenizer import save_tokenizer, train_tokenizer
from distllm.engines import native
from distllm.errors import ConfigError
from distllm.objectives import preference as preference_objective
from distllm.objectives.reward import Reward, RewardOptions
from distllm.pipeline import reinforcement
from distllm.pipeline.build import Builder
from distllm.rl import advantages, algorithm, layout, objective, shaping
from distllm.rl.algorithms import ppo
from distllm.rl.algorithms.ppo import whiten_advantages
from distllm.rl.options import RLOptions
from distllm.rl.rewards import model as reward_model
from distllm.rl.shaping import shape_rewards
from distllm.testing.rl import make_algorithm, make_rollout
from distllm.testing.tiny import PAD_ID, single_engine, tiny_decoder
from distllm.types import Batch, ModelOutput

GROUPED = [n for n in registry.names("algorithm") if registry.get("algorithm", n).compares_group]


def splits_agree(name):
    expected, losses = gradients(*case(name), recorded(), [8])
    found, others = gradients(*case(name), recorded(), [5, 2, 1])
    assert largest_difference(expected, found) < 1e-10
    assert others == pytest.approx(losses, abs=1e-12)


def test_item_12_loss_and_gradient_do_not_depend_on_the_split():
    law = "scale[k] * x for k, x in losses.items()"
    means = "scale[k] * x * totals[k] / (len(micro_batches) * objective.weights(batch)[k]) for k, x in losses.items()"  # fmt: skip
    holds_and_notices(lambda: splits_agree("grpo"), (native, law, means))


def test_item_13_value_kl_and_entropy_obey_it_too():
    holds_and_notices(
        lambda: splits_agree("value"),
        (ppo, "0.5 * (error * tokens.learned).sum()", "0.5 * (error * tokens.learned).mean()"),
    )
    for term, old in (
        ("kl", 'losses["kl"] = _weighted_sum(kl, tokens)'),
        ("entropy", 'losses["entropy"] = _weighted_sum(entropy, tokens)'),
    ):
        noticed(lambda: splits_agree("grpo"), objective, old, f'losses["{term}"] = {term}.mean()')


def test_item_14_no_label_is_lost_where_a_text_is_cut_into_rows():
    """A document longer than a row: every token but its first is predicted once, from its own past."""
    documents = [list(range(10, 33)), [40], list(range(50, 61))]

    def check():
        rows = PackedDataset(
            [torch.tensor(d).numpy() for d in documents], 8, eos_id=1, pad_id=0, num_bytes=1
        )
        pairs = []
        for i in range(len(rows)):
            row = rows[i]
            for token, label in zip(row.input_ids, row.labels, strict=True):
                if label != -100:
                    pairs.append((int(token), int(label)))
        expected = [p for d in documents for p in zip([*d], [*d[1:], 1], strict=True)]
        assert sorted(pairs) == sorted(expected)

    check()
    # The bug: the last label of each row is dropped.
    real = PackedDataset.__getitem__

    def dropped(self, index):
        row = real(self, index)
        row.labels = torch.as_tensor(row.labels).clone()
        row.labels[-1] = -100
        return row

    PackedDataset.__getitem__ = dropped
    try:
        with pytest.raises(AssertionError):
            check()
    finally:
        PackedDataset.__getitem__ = real


def test_item_15_what_is_masked_adds_nothing_and_is_not_counted(on_two_ranks):
    def check():
        for name in ("grpo", "gspo", "dr_grpo", "value"):
            good = [r for r in recorded() if math.isfinite(r.reward)]
            expected, _ = gradients(*case(name), good, [len(good)])
            found, _ = gradients(*case(name), recorded(), [8])
            assert largest_difference(expected, found) < 1e-10, name

    finite = "learned = learned & torch.isfinite(batch.rewards)[index]"
    holds_and_notices(check, (layout, finite, "pass"))
    # A rank that has nothing left still takes part: nobody waits, and the step is that of the others.
    weights = [rank["masked"]["own weight"] for rank in on_two_ranks]
    assert weights[0] > 0 and weights[1] == 0
    assert all(rank["masked"]["difference"] < 1e-10 for rank in on_two_ranks)


def test_item_16_whitening_is_over_the_whole_batch_with_the_stated_variance():
    def check():
        rollouts = [
            make_rollout([1], [2, 3, 4], advantages=[1.0, 5.0, 3.0], reward=1.0),
            make_rollout([1], [2], advantages=[-7.0], reward=0.0),
            make_rollout([1], [2, 3], advantages=[99.0, 99.0], reward=math.nan),
        ]
        whiten_advantages(rollouts)
        values = torch.tensor([1.0, 5.0, 3.0, -7.0], dtype=torch.float64)
        biased = (values - values.mean()) / (values.var(correction=0) + 1e-8).sqrt()
        found = torch.cat([r.advantages for r in rollouts[:2]])
        torch.testing.assert_close(found, biased, rtol=0, atol=1e-12)
        assert rollouts[2].advantages.tolist() == [0.0, 0.0]

    each = "white = [whiten(p) for p in parts]"
    holds_and_notices(
        check,
        (ppo, "white = whiten(flat).split([len(p) for p in parts])", each),
        (advantages, 'second["squares"] / count', 'second["squares"] / (count - 1)'),
        (ppo, "learned = [r for r in rollouts if math.isfinite(r.reward)]\n    parts", "learned = list(rollouts)\n    parts"),
    )  # fmt: skip


def prepared(name, rewards, **options):
    """Advantages of the first token of each of the responses to one prompt, and the metrics."""
    made = make_algorithm(
        name, tiny_decoder(), num_samples=len(rewards), kl_coef=0.0, on_policy=True, **options
    )
    rollouts = [make_rollout([1], [2, 3], score=r) for r in rewards]
    shape_rewards(rollouts, made.options, 8)
    metrics = made.prepare(rollouts, {"policy": single_engine(tiny_decoder())})
    return [r.advantages[0].item() for r in rollouts], metrics


def test_item_17_a_group_of_one_is_refused_and_one_without_spread_teaches_nothing():
    for name in GROUPED:
        with pytest.raises(ConfigError, match="at least 2"):
            prepared(name, [1.0])
        with pytest.raises(ConfigError, match=f"{name} compares .* at least 2"):
            compose([f"stage={name}", "data=skills", "stage.num_samples=1"])
    lax = with_bug(advantages, "if num_samples < 2:", "if num_samples < 1:")
    lax.group_advantages(torch.tensor([[1.0]]))  # without the rule nothing would stop it

    def check():
        for name in GROUPED:
            found, metrics = prepared(name, [0.1] * 7)
            assert found == [0.0] * 7 and metrics["rl/zero_spread"] == 1.0

    exact, rounded = "spread = highest > lowest", "spread = centred.abs().amax(1, keepdim=True) > 0"
    holds_and_notices(check, (advantages, exact, rounded))
    check_trap_17_zero_spread(advantages)


def test_item_18_an_unscorable_response_is_in_no_baseline_and_learns_nothing():
    def check():
        for name in registry.names("algorithm"):
            if name == "ppo":
                continue  # its values are no part of this; whitening is item 16
            found, _ = prepared(name, [1.0, math.nan, 4.0, 3.0])
            alone, _ = prepared(name, [1.0, 4.0, 3.0])
            assert found[1] == 0.0, name
            assert [found[0], *found[2:]] == pytest.approx(alone, abs=1e-6), name

    known = "scored = torch.isfinite(rewards)"
    holds_and_notices(
        check,
        (advantages, known, "rewards = rewards.nan_to_num(0.0); scored = torch.isfinite(rewards)"),
    )
    check_trap_18_unscorable(advantages)


def test_item_19_a_masked_response_does_not_shift_its_siblings():
    def check():
        made = make_algorithm("grpo", tiny_decoder(), num_samples=4, truncated="mask")
        rollouts = [make_rollout([1], [2, 3], score=s) for s in (1.0, 9.0, 4.0, 3.0)]
        rollouts[1].finish_reason = "length"
        shape_rewards(rollouts, made.options, 2)
        made.on_policy = True
        made.prepare(rollouts, {"policy": single_engine(tiny_decoder())})
        alone, _ = prepared("grpo", [1.0, 4.0, 3.0])
        assert [rollouts[i].advantages[0].item() for i in (0, 2, 3)] == pytest.approx(alone)
        assert rollouts[1].advantages.tolist() == [0.0, 0.0]

    holds_and_notices(check, (algorithm, "[r.reward for r in rollouts]", "[r.score for r in rollouts]"))  # fmt: skip


def test_item_20_the_reward_falls_on_the_last_token_that_was_sampled():
    made = make_algorithm("ppo", tiny_decoder(), kl_coef=0.0)

    def check():
        whole = make_rollout([1], [2, 3, 4], reward=5.0)
        assert made.token_rewards(whole).tolist() == [0, 0, 5]
        tool = make_rollout([1], [2, 3, 30, 31], reward=5.0, loss_mask=[True, True, False, False])
        assert made.token_rewards(tool).tolist() == [0, 5, 0, 0]

    last = "return int(rollout.loss_mask.nonzero()[-1])"
    holds_and_notices(check, (algorithm, last, "return len(rollout.response_ids) - 1"))


def test_item_21_the_score_is_read_at_the_last_real_token():
    for head in ("last", "likelihood"):
        check_trap_21_model_scores(reward_model, head)
    model = tiny_decoder("last").double().eval()

    def check():
        ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [5, 6, 7, 8, 0]])
        mask = ids != 0
        mask[2] = torch.tensor([1, 1, 1, 1, 1]).bool()  # the padding id is a real token here
        scores = [model(ids[i : i + 2], mask[i : i + 2]).scores for i in (0, 1)]
        alone = [model(torch.tensor([r])).scores[0] for r in ([5, 6, 7], [5, 6, 7, 8, 0])]
        assert torch.allclose(scores[0][0], alone[0]) and torch.allclose(scores[0][1], alone[0])
        assert torch.allclose(scores[1][0], alone[0]) and torch.allclose(scores[1][1], alone[1])

    read = "torch.where(attention_mask.bool(), columns, 0).amax(dim=1)"
    holds_and_notices(
        check,
        (pooling, read, "attention_mask.sum(dim=1) - 1"),
        (pooling, read, "torch.full((len(hidden),), hidden.shape[1] - 1)"),
    )


def test_item_22_the_pairwise_loss_is_stable():
    margins = torch.tensor([0.0, 3.0, -3.0, 2e4, -2e4], dtype=torch.float64, requires_grad=True)
    scores = torch.cat([margins, torch.zeros(5, dtype=torch.float64)])
    fake = SimpleNamespace(scores=lambda hidden, batch: scores, reward_std=1.0, reward_mean=0.0)

    class Model:
        head = fake

        def __call__(self, **_):
            return ModelOutput(last_hidden_state=torch.zeros(10, 1, 1))

    def check():
        made = Reward(RewardOptions(), PAD_ID, None)
        batch = Batch(input_ids=torch.zeros(10, 1, dtype=torch.int64))
        batch.margins, batch.confidences = torch.zeros(5), torch.ones(5)
        loss = made.loss(Model(), batch).losses["pairs"]
        expected = math.log(2) + math.log1p(math.exp(-3)) + math.log1p(math.exp(3)) + 2e4
        assert loss.item() == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(loss, margins, retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient[4] == pytest.approx(-1.0)

    stable = "return confidences * F.logsigmoid(logits)"
    naive = "return confidences * torch.log(torch.sigmoid(logits))"
    holds_and_notices(check, (preference_objective, stable, naive))


def test_item_23_heads_start_as_published_and_dropout_is_off_in_rl(tmp_path):
    def check_heads():
        options = DecoderOptions(vocab_size=8, d_model=4096, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=4, max_seq_len=4)  # fmt: skip
        model = Decoder(options, head="last", seed=0)
        weight = model.head.weight.detach()
        assert weight.std().item() == pytest.approx(4097**-0.5, rel=0.05)
        assert abs(weight.mean().item()) < 4 * 4097**-0.5 / 64
        assert getattr(model.head, "bias", None) is None
        value = tiny_decoder("value").head
        assert not value.weight.any() and not value.bias.any()

    holds_and_notices(check_heads, (verdict_heads, "(d_model + 1) ** -0.5", "init_std"))

    def check_dropout():
        (tmp_path / "run").mkdir(exist_ok=True)
        texts = ["The cat sat on the mat.", "Two and two make four."] * 4
        save_tokenizer(train_tokenizer(texts, 300), tmp_path / "tokenizer")
        config = compose(
            ["stage=ppo", "data=skills", "arch.dropout=0.5", "arch.vocab_size=512", "arch.d_model=16",
             "arch.n_layers=1", "arch.d_ff=16", "arch.max_seq_len=96", "train.seq_len=64", "generation.max_new_tokens=8",
             "data.num_train=8", "data.num_prompts=8", "data.num_heldout=4", "train.precision=fp32",
             f"run.dir='{tmp_path / 'run'}'", f"tokenizer='{tmp_path / 'tokenizer'}'"]
        )  # fmt: skip
        parts = reinforcement.build(Builder(config, tmp_path / "run"))
        assert set(parts.engines) == {"policy", "reference", "value"}
        for role, engine in parts.engines.items():
            assert [b.dropout for b in engine.model.blocks()] == [0.0], role

    old = 'value = builder.model("value", dropout=False)'
    holds_and_notices(check_dropout, (reinforcement, old, 'value = builder.model("value")'))


def test_item_24_rewards_are_clipped_before_they_are_compared():
    def check():
        found, _ = prepared("grpo", [100.0, 0.0, 1.0], reward_clip=2.0)
        expected, _ = prepared("grpo", [2.0, 0.0, 1.0])
        assert found == pytest.approx(expected)
        white, _ = prepared("rloo", [100.0, 0.0, 1.0], reward_clip=2.0, whiten_rewards=True)
        r = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
        r = (r - r.mean()) / (r.var(correction=0) + 1e-8).sqrt() + r.mean()
        assert white == pytest.approx((1.5 * (r - r.mean())).tolist())

    holds_and_notices(check, (shaping, "if options.reward_clip:", "if False:"))


def test_item_25_truncated_responses_have_three_policies_and_an_explicit_bootstrap():
    def shaped(length=4, **options):
        cut = make_rollout([1], list(range(2, 2 + length)), score=3.0, finish_reason="length")
        done = make_rollout([1], [2, 3], score=3.0)
        shape_rewards([cut, done], RLOptions(**options), 8)
        assert done.reward == 3.0
        return cut.reward

    def check_policies():
        assert shaped(truncated="keep") == 3.0
        assert shaped(truncated="penalise", truncated_penalty=0.5) == 2.5
        assert math.isnan(shaped(truncated="mask"))
        # Overlong: the last half of 8 tokens, so 6 tokens are half-way in; before any baseline.
        assert shaped(length=6, overlong_buffer=0.5, overlong_penalty=2.0) == 2.0
        assert shaped(length=8, overlong_buffer=0.5, overlong_penalty=2.0) == 1.0

    holds_and_notices(
        check_policies,
        (shaping, "reward -= options.truncated_penalty", "pass"),
        (shaping, "reward = math.nan", "reward = 0.0"),
        (shaping, "(length - (budget - span)) / span", "length / budget"),
    )

    def check_bootstrap():
        for bootstrap in (False, True):
            made = make_algorithm(
                "ppo", tiny_decoder(), kl_coef=0.0, gamma=0.9, gae_lambda=1.0, bootstrap_truncated=bootstrap
            )  # fmt: skip
            value = tiny_decoder("value", seed=1)
            with torch.no_grad():
                value.head.weight.normal_(generator=torch.Generator().manual_seed(0))
            engines = {"policy": single_engine(tiny_decoder()), "value": single_engine(value)}
            for reason in ("length", "stop"):
                rollout = make_rollout([1, 2], [3, 4], reward=3.0, finish_reason=reason)
                made.prepare([rollout], engines)
                with torch.no_grad():
                    after = value(torch.tensor([[1, 2, 3, 4]])).values[0, -1].item()
                follows = 0.9 * after if bootstrap and reason == "length" else 0.0
                assert rollout.returns[-1].item() == pytest.approx(3.0 + follows, abs=1e-5)

    holds_and_notices(check_bootstrap, (ppo, "0.0 if ended else last_value", "0.0"))


def test_zero_spread_groups_are_resampled_where_asked():
    made = make_algorithm("dapo", tiny_decoder())
    assert not made.accept([make_rollout([1], [2], score=1.0)] * 3)
    assert made.accept([make_rollout([1], [2], score=s) for s in (1.0, 0.0)])
    assert not made.accept([make_rollout([1], [2], score=s) for s in (1.0, math.nan)])
