"""Weights in bf16 for the length of a rollout: autocast's results, nothing stale or changed."""

from contextlib import nullcontext

import pytest
import torch
from patched import with_bug
from test_generate import PROMPTS, ids, run, tiny

from distllm.generation import generate as ours
from distllm.generation import weights


def sample(model, module=ours, **settings):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return run(model, module=module, num_samples=4, **settings)


def change(model):
    """An optimizer's update: in place, same tensors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.sign(parameter), alpha=0.05)


def check_nothing_stale(lowered, monkeypatch):
    """After an update the sampler follows a fresh model that has the new weights."""
    monkeypatch.setattr(ours, "lowered", lowered)
    model = tiny()
    first = ids(sample(model))
    change(model)
    second = ids(sample(model))
    fresh = tiny(seed=5)
    fresh.load_state_dict(model.state_dict())
    monkeypatch.setattr(ours, "lowered", weights.lowered)
    assert second == ids(sample(fresh))
    assert second != first


def test_item_37_nothing_of_the_weights_before_an_update_is_left(monkeypatch):
    check_nothing_stale(weights.lowered, monkeypatch)
    kept = with_bug(
        weights,
        "cast = parameter.detach().to(dtype)",
        "cast = globals().setdefault('OLD', {})"
        ".setdefault(id(parameter), parameter.detach().to(dtype))",
    )
    with pytest.raises(AssertionError):
        check_nothing_stale(kept.lowered, monkeypatch)


def uneven():
    """A model whose norms are not all ones, which every dtype could hold."""
    model = tiny()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.2)
    return model


def check_arithmetic_is_autocasts(lowered, monkeypatch):
    """Token for token and bit for bit what autocast alone gives."""
    monkeypatch.setattr(ours, "lowered", lambda *_: nullcontext())
    plain = sample(uneven())
    monkeypatch.setattr(ours, "lowered", lowered)
    fast = sample(uneven())
    assert ids(fast) == ids(plain)
    for a, b in zip(fast, plain, strict=True):
        assert torch.equal(a.rollout_logprobs, b.rollout_logprobs)


def test_arithmetic_is_autocasts(monkeypatch):
    check_arithmetic_is_autocasts(weights.lowered, monkeypatch)
    for old, new in [
        ("return F.embedding(args[0], table)", "return output"),
        ("if parameter.ndim >= 2 and", "if"),
    ]:
        broken = with_bug(weights, old, new)
        with pytest.raises(AssertionError):
            check_arithmetic_is_autocasts(broken.lowered, monkeypatch)


def test_both_updates_inside_one_autocast_context():
    """torch caches casts until the outermost autocast ends; the sampler must not see that cache."""
    model, fresh = tiny(), tiny()
    change(fresh)
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        change(model)
        late = ids(run(model, num_samples=4))
    assert late == ids(sample(fresh))


def test_weights_are_untouched_bit_for_bit():
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    sample(model)
    with pytest.raises(ZeroDivisionError), weights.lowered(model, torch.bfloat16):
        assert model.embed.weight.dtype == torch.bfloat16
        assert model.final_norm.weight.dtype == torch.float32
        raise ZeroDivisionError
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.data_ptr() == places[name]
        assert torch.equal(parameter, before[name])
    assert not model.embed._forward_hooks
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def check_gradient_hooks_stay(lowered):
    """What DistributedDataParallel puts on a parameter is there after a rollout."""
    model = tiny()
    seen = []
    nodes = []  # kept alive, as DistributedDataParallel does
    for name, parameter in model.named_parameters():
        nodes.append(parameter.view_as(parameter).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(lambda *_, name=name: seen.append(name))
    with lowered(model, torch.bfloat16):
        pass
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())


def test_gradient_hooks_stay():
    check_gradient_hooks_stay(weights.lowered)
    broken = with_bug(
        weights,
        "            module._parameters[name] = copies[id(parameter)]\n",
        "            parameter.data = cast\n            parameter.data = cast.float()\n",
    )
    with pytest.raises(AssertionError):
        check_gradient_hooks_stay(broken.lowered)


def test_logprobs_agree_with_the_training_path_in_bf16():
    """Both in bf16 autocast: means within 0.01 nats, where others call training off policy."""
    model = tiny()
    rollouts = sample(model, max_new_tokens=40)
    batch = model.join([r.prompt_ids for r in rollouts], ids(rollouts), 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        hidden = model(
            batch.input_ids, batch.attention_mask, compute_logits=False
        ).last_hidden_state
        logprobs, _ = model.head.logprobs(hidden, batch.labels, 1.0)
    trained = logprobs[batch.labels != -100].double()
    sampled = torch.cat([r.rollout_logprobs for r in rollouts]).double()
    assert len(sampled) == 40 * 4 * len(PROMPTS)
    assert (trained - sampled).mean().abs() < 0.01
    assert (trained - sampled).abs().mean() < 0.05


def test_fp32_and_fp64_run_in_their_own_dtype():
    single, double = tiny(), tiny().double()
    assert ids(run(single)) == ids(run(double))
    assert run(double)[0].rollout_logprobs.dtype == torch.float64
