"""Checklist, items 28 to 36: ratios, the divergence, what is sampled and what is scored."""

import dataclasses
import math
import re

import pytest
import torch
from checklist import holds_and_notices

from distllm import registry
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.config import rl_checks
from distllm.config.compose import compose
from distllm.config.fields import meaning
from distllm.config.rl_checks import SAMPLES_FREELY, rl_rules
from distllm.engines import native
from distllm.errors import ConfigError
from distllm.generation.options import GenerationOptions
from distllm.layers import chunked_logprobs, cross_entropy, products
from distllm.rl import advantages, layout, objective, scoring, surrogate
from distllm.rl.options import RLOptions
from distllm.rl.scoring import score_logprobs
from distllm.rl.surrogate import OFF_POLICY, off_policy_weights
from distllm.testing.rl import make_algorithm, make_rollout
from distllm.testing.rl_loop import make_source
from distllm.testing.tiny import PAD_ID, VOCAB_SIZE, single_engine, tiny_decoder
from distllm.train.step import optimizer_step

END = VOCAB_SIZE - 1


def first_updates(name, count=1, max_new_tokens=6, **options):
    """Run the first updates of the real loop; return what each of the policy's steps reported."""
    engines = {"policy": single_engine(tiny_decoder(), "policy")}
    engines["reference"] = single_engine(tiny_decoder(seed=4), "reference", trained=False)
    if registry.get("algorithm", name).trains_value:
        engines["value"] = single_engine(tiny_decoder("value", seed=1), "value")
    options = {"num_samples": 4, "rollout_batch_size": 32, "temperature": 0.7} | options
    source = make_source(
        name, engines, [[1, 2, 3], [4], [5, 6]], lambda p, r: len(set(r)) - len(r) / 3,
        end_id=END, max_new_tokens=max_new_tokens, batch_size=16, **options,
    )  # fmt: skip
    results = []
    for step in range(count):
        work, _ = source.next(step)
        for part in work:
            result = optimizer_step(part.engine, part.objective, part.micro_batches, 1e-2)
            if part.engine.role == "policy":
                results.append(result)
    return results


def test_item_28_on_the_first_inner_step_the_ratio_is_one_and_the_gradient_is_not_zero():
    """Users read "loss near 0" as a bug; it is what advantages that sum to 0 give. The gradient tells."""

    def check():
        for name in registry.names("algorithm"):
            first, second = first_updates(name, 2)
            seen = first.metrics
            assert abs(seen["rl/ratio_mean"] - 1) < 1e-5 and seen["rl/approx_kl"] < 1e-8, name
            assert abs(seen["rl/ratio_square"] - 1) < 1e-5 and seen["rl/clip_fraction"] == 0, name
            assert first.grad_norm > 1e-3, name
            assert second.metrics["rl/approx_kl"] > 1e-8, f"{name}: the policy has moved since"
        # GRPO's advantages sum to 0 over a group of equal lengths, and so does its loss.
        (even,) = first_updates("grpo", rollout_batch_size=0, num_epochs=2, temperature=2.0)
        assert abs(even.loss) < 0.5 and even.grad_norm > 1e-2

    def on_policy():
        (only,) = first_updates("grpo", rollout_batch_size=0)
        assert only.metrics["rl/ratio_mean"] == 1.0 and only.grad_norm > 1e-3

    tempered = "batch.labels, temperature)[0]"
    holds_and_notices(check, (scoring, tempered, "batch.labels)[0]"))
    old = "old = logprobs.detach() if on_policy"
    holds_and_notices(on_policy, (objective, old, "old = logprobs if on_policy"))


def bent(field):
    """Return a value of a sampling option other than its default."""
    default = field.default_factory() if callable(field.default_factory) else field.default
    if isinstance(default, bool):
        return not default
    return {int: 3, float: 0.5, list: "[x]"}[type(default)]


def test_item_29_rl_refuses_whatever_bends_the_distribution_it_samples_from():
    """The log-probabilities themselves, under every such option: `tests/generation/test_generate.py`."""
    bending = [f for f in dataclasses.fields(GenerationOptions) if f.name not in SAMPLES_FREELY]
    assert {"top_k", "top_p"} <= {f.name for f in bending}

    def check():
        for field in bending:
            setting = f"generation.{field.name}={bent(field)}"
            try:
                compose(["stage=grpo", "data=skills", setting])
            except ConfigError as error:
                assert "distribution it samples from" in str(error) and field.name in str(error)
            else:
                raise AssertionError(f"{setting} went through")

    holds_and_notices(check, (rl_checks, "getattr(generation, n) != getattr(free, n)", "False"))


def with_heads():
    """A plain output layer, and one whose logits are squashed (another code path)."""
    shape = {"vocab_size": 37, "d_model": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4, "d_ff": 32,
             "max_seq_len": 16, "init_std": 0.5}  # fmt: skip
    return [Decoder(DecoderOptions(**shape, logit_softcap=cap)).double() for cap in (None, 3.0)]


def test_item_30_entropy_has_the_temperature_of_the_log_probabilities_and_a_backward():
    labels = torch.tensor([[3, 7, -100, 11, 30]])
    hidden = torch.randn(1, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def check():
        for model in with_heads():
            for temperature in (0.5, 1.0, 1.7):
                mine, theirs = (hidden.clone().requires_grad_() for _ in range(2))
                logprobs, entropy = model.head.logprobs(mine, labels, temperature)
                everything = (model.head.logits(theirs) / temperature).log_softmax(-1)
                at = labels != -100
                wanted = -(everything.exp() * everything).sum(-1)[at]
                torch.testing.assert_close(entropy[at], wanted, rtol=0, atol=1e-10)
                taken = everything[at].gather(1, labels[at][:, None])[:, 0]
                torch.testing.assert_close(logprobs[at], taken, rtol=0, atol=1e-10)
                (entropy.sum() + 0.3 * logprobs.sum()).backward()
                (wanted.sum() + 0.3 * taken.sum()).backward()
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)

    holds_and_notices(
        check,
        (
            cross_entropy,
            "entropy[rows][part] = normaliser - torch.linalg.vecdot(probabilities, scores)",
            "q = torch.softmax(scores * temperature, -1); entropy[rows][part] = -(q * q.log()).sum(-1)",
        ),
        (cross_entropy, "(grad_entropy / ctx.temperature)[:, None]", "grad_entropy[:, None]"),
        (
            chunked_logprobs,
            "entropy = -(logprobs.exp() * logprobs).sum(dim=-1)",
            "q = logits.log_softmax(-1); entropy = -(q.exp() * q).sum(dim=-1)",
        ),
    )


def test_item_31_log_probabilities_are_fp32_and_the_mismatch_with_the_sampler_is_measured(
    monkeypatch,
):
    hidden = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.randint(0, 37, (1, 40), generator=torch.Generator().manual_seed(1))

    def check_dtype():
        for model in with_heads():
            model.float()
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                found, entropy = model.head.logprobs(hidden, labels, 0.7)
                logits = model.head.logits(hidden)
            assert logits.dtype == torch.bfloat16, "the case is one of lower precision"
            assert found.dtype == entropy.dtype == torch.float32
            exact = (logits.double() / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            assert (found - exact).abs().max() < 1e-4

    check_dtype()  # as this CPU multiplies bf16; with the bug, as hardware does
    monkeypatch.setattr(products, "HAS_FAST_BF16", True)
    holds_and_notices(
        check_dtype,
        (
            cross_entropy,
            "scores = logits[part].to(precise).div_(temperature)",
            "scores = (logits[part] / temperature).log_softmax(-1).to(precise)",
        ),
        (chunked_logprobs, "logits.to(wide(logits.dtype)) / temperature", "logits / temperature"),
    )

    def check_measured():
        loss = make_algorithm("grpo", tiny_decoder()).policy
        rollout = make_rollout([1], [2, 3, 4], advantages=[1.0] * 3, old_logprobs=[-1.0, -2.0, -3.0],
                               rollout_logprobs=[-1.1, -1.8, -3.0])  # fmt: skip
        seen = loss.loss(tiny_decoder(), loss.collate([rollout])).metrics
        gap, ratio = (seen[f"rl/sampler_mismatch{end}"] for end in ("", "_ratio"))
        assert (gap[0] / gap[1]).item() == pytest.approx(0.3 / 3)
        assert (ratio[0] / ratio[1]).item() == pytest.approx((math.exp(0.1) + math.exp(0.2) + 1) / 3)  # fmt: skip
        (real,) = first_updates("grpo", num_epochs=2)
        assert real.metrics["rl/sampler_mismatch"] < 1e-5
        assert real.metrics["rl/sampler_mismatch_ratio"] < 1.00001

    gap = "(old - rollout).abs()"
    holds_and_notices(check_measured, (objective, gap, gap.removesuffix(".abs()")))


def documented(name):
    """Return the values that a setting's own text and its rule name."""
    words = rl_rules()[f"stage.{name}"].words.removeprefix("must be one of ").split(", ")
    told = set(re.findall(r"`(\w+)`", meaning(RLOptions, name)))
    return words, told


def test_item_33_every_documented_option_is_exercised():
    choices = {"kl_in": {"kl_coef": 0.1}, "kl_kind": {"kl_coef": 0.1}, "off_policy": {},
               "aggregation": {}, "truncated": {"max_new_tokens": 30, "temperature": 3.0}}  # fmt: skip
    listed = {k.removeprefix("stage.") for k, r in rl_rules().items() if "one of" in r.words}
    assert listed & {f.name for f in dataclasses.fields(RLOptions)} - {"reward_reads"} == set(
        choices
    )

    def check():
        for name, others in choices.items():
            words, told = documented(name)
            assert set(words) <= told, f"{name}: {set(words) - told} has no words of its own"
            seen = set()
            for word in words:
                try:
                    (result,) = first_updates("grpo", **others, **{name: word})
                except ConfigError as error:
                    raise AssertionError(f"{name}={word} is documented and refused") from error
                assert math.isfinite(result.loss) and result.grad_norm > 0, (name, word)
                seen.add(round(result.grad_norm, 7))
            if name in ("kl_in", "aggregation", "truncated"):
                assert len(seen) == len(words), f"the choices of {name} do the same"

    holds_and_notices(
        check,
        (surrogate, 'case "mask":', 'case "masks":'),
        (advantages, 'case "k3":', 'case "k3+":'),
        (layout, 'max_response_tokens if aggregation == "constant" else', ""),
    )


def test_item_35_importance_weights_are_detached_bounded_and_applied_once():
    lengths = [3, 1]
    rollouts = [make_rollout([1], [2] * n, advantages=[1.0] * n) for n in lengths]
    loss = make_algorithm("grpo", tiny_decoder()).policy
    tokens = loss._tokens(loss.collate(rollouts))
    far = torch.tensor([60.0, 0.1, -0.2, 50.0], dtype=torch.float64, requires_grad=True)

    def check_bounds():
        for kind in OFF_POLICY:
            weights = off_policy_weights(far, torch.zeros(4), tokens, kind, 0.5, 2.0)
            assert not weights.requires_grad, f"{kind}: a weight that learns is no weight"
            assert weights.min() >= 0 and weights.max() <= (1 if kind == "none" else 2), kind

    holds_and_notices(
        check_bounds,
        (surrogate, "gap = (old - rollout).detach()", "gap = old - rollout"),
        (surrogate, "return weights.clamp(max=high)", "return weights"),
        (surrogate, "(weights < low) | (weights > high)", "weights < low"),
    )
    model = tiny_decoder().double()

    def check_once():
        """l = l_old, so rho = 1 and the loss is -w A: not w^2, and not w exp(l - l_rollout)."""
        for kind in ("token_truncate", "sequence_truncate"):
            made = make_algorithm("grpo", model, off_policy=kind, off_policy_high=9.0).policy
            r = make_rollout([1, 2], [3, 4], advantages=[1.0, 2.0])
            engine = single_engine(model, trained=False)
            (r.old_logprobs,) = score_logprobs(engine, [r], model.join, PAD_ID, 1.0, 1)
            r.rollout_logprobs = r.old_logprobs - torch.tensor([0.3, 0.2])
            out = made.loss(model, made.collate([r])).losses["policy"].item()
            w = [math.exp(0.3), math.exp(0.2)] if kind[0] == "t" else [math.exp(0.5)] * 2
            assert out == pytest.approx(-(w[0] + 2 * w[1])), kind

    once = "policy = policy * self._off_policy_weights(old, batch, tokens)"
    twice = "w = self._off_policy_weights(old, batch, tokens); policy = policy * w * w"
    double = "ratio = token_ratio(logprobs.detach(), old)"
    rollout_ratio = (
        double
        + "; surrogate.loss = surrogate.loss * (old - tokens.take(batch.rollout_logprobs)).exp()"
    )
    holds_and_notices(check_once, (objective, once, twice), (objective, double, rollout_ratio))


def test_item_36_old_log_probabilities_are_computed_without_dropout():
    model = tiny_decoder(dropout=0.5).double()
    engine = single_engine(model)
    rollouts = [make_rollout([1, 2, 3], [4, 5, 6]), make_rollout([7], [8, 9])]

    def check():
        model.train()
        batch = model.join([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], PAD_ID)  # fmt: skip
        first, again = (
            torch.cat(score_logprobs(engine, rollouts, model.join, PAD_ID, 1.0, 2))
            for _ in range(2)
        )
        with torch.no_grad():
            table = model.eval()(batch.input_ids, batch.attention_mask).logits.log_softmax(-1)
        at = batch.labels != -100
        exact = table[at].gather(1, batch.labels[at][:, None])[:, 0]
        assert torch.equal(first, again), "two passes differ"
        assert (first - exact).abs().max() < 1e-10

    quiet = "self.model.eval()\n        with torch.no_grad(), self._autocast():\n            return"
    holds_and_notices(check, (native, quiet, quiet.replace("eval", "train")))
