"""Reward models: the loss by hand, the score's place under any padding, what is saved, what evaluation tells."""

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from patched import with_bug

from distllm import load_model
from distllm.arch import pooling
from distllm.cli.main import main
from distllm.objectives import preference, reward
from distllm.objectives.reward import Reward, RewardOptions, raw_score, score
from distllm.pipeline.judge import judge, pad_left, pad_right
from distllm.testing.stages import SKILLS, TINY, run_tiny
from distllm.testing.tiny import PAD_ID, pair_examples, single_engine, tiny_decoder
from distllm.train.intervals import (
    area_under_roc,
    expected_calibration_error,
    reliability,
    slope_through_origin,
)


def loss_of(scores, options, **fields):
    """Return the losses of pairs whose answers a stub scores."""
    pairs = pair_examples(len(scores[0]))
    for name, values in fields.items():
        for pair, value in zip(pairs, values, strict=True):
            setattr(pair, name, value)
    model = tiny_decoder("last").double()
    objective = Reward(options, PAD_ID, model.join)
    batch = objective.collate(pairs)
    flat = torch.tensor([*scores[0], *scores[1]], dtype=torch.float64)
    model.head.scores = lambda hidden, batch: flat
    return {k: v.item() for k, v in objective.loss(model, batch).losses.items()}


def test_by_hand():
    """Scores 2 and 1 against 1 and 3: differences 1 and -2."""
    scores = ([2.0, 1.0], [1.0, 3.0])
    plain = loss_of(scores, RewardOptions())
    assert plain == {"pairs": pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(2)))}
    # A margin of 0.5 on the first pair, a label that is right with probability 3/4 on the second.
    other = loss_of(scores, RewardOptions(center_coef=0.01), margin=[0.5, 0], confidence=[1, 0.75])
    soft = 0.75 * math.log1p(math.exp(2)) + 0.25 * math.log1p(math.exp(-2))
    assert other["pairs"] == pytest.approx(math.log1p(math.exp(-0.5)) + soft)
    assert other["center"] == pytest.approx(3**2 + 4**2)


def test_loss_equals_trl():
    """TRL's RewardTrainer: -log sigmoid(chosen - rejected - margin), plus the squared sum."""
    scores, margins = ([0.3, -1.2, 2.0], [0.1, 0.5, -1.0]), [0.0, 1.0, 0.25]
    chosen, rejected = map(torch.tensor, scores)
    theirs = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(margins)).mean()
    theirs = theirs + 0.1 * torch.mean((chosen + rejected) ** 2)
    ours = loss_of(scores, RewardOptions(center_coef=0.1), margin=margins)
    assert (ours["pairs"] + 0.1 * ours["center"]) / 3 == pytest.approx(theirs.item(), rel=1e-6)


def test_item_22_the_log_sigmoid_is_stable():
    for size in (1.0, 100.0, 1e4):
        found = loss_of(([-size], [size]), RewardOptions())["pairs"]
        assert found == pytest.approx(2 * size if size > 1 else math.log1p(math.exp(2)), rel=1e-6)
    bad = with_bug(
        preference,
        "return confidences * F.logsigmoid(logits) + (1 - confidences) * F.logsigmoid(-logits)",
        "return confidences * torch.sigmoid(logits).log()",
    )
    assert math.isinf(bad.smoothed_log_sigmoid(torch.tensor(-200.0), torch.tensor(1.0)).item())


@pytest.mark.parametrize("pad_id", [PAD_ID, 36])
def test_item_21_the_score_is_read_at_the_last_real_token(pad_id):
    """Under right, left and more padding, in any batch, and where the padding is a token that also occurs in answers."""
    model = tiny_decoder("last").double()
    objective = Reward(RewardOptions(), pad_id, model.join)
    pairs = pair_examples(6)
    for pair in pairs:
        pair.chosen_ids[-1] = 36  # as if the end token were the padding token
    alone = [
        score(model, objective.collate([p]))[i].item() for i in range(2) for p in pairs
    ]  # fmt: skip
    expected = torch.tensor(alone, dtype=torch.float64)
    for change in (lambda b, p: b, pad_right, pad_left):
        batch = change(objective.collate(pairs), pad_id)
        torch.testing.assert_close(score(model, batch), expected, rtol=1e-9, atol=1e-12)
    mask = pad_left(objective.collate(pairs), pad_id).attention_mask
    assert mask[:, -1].all() and not mask.all()
    # A score read at the last column would differ.
    last_column = model(**objective.collate(pairs).inputs(), compute_logits=False).last_hidden_state
    wrong = (last_column[:, -1] * model.head.weight).sum(-1)
    assert (wrong - expected).abs().max() > 1e-3
    assert pooling.__doc__


def test_raw_scores_do_not_depend_on_the_normalisation():
    model = tiny_decoder("last").double()
    objective = Reward(RewardOptions(), PAD_ID, model.join)
    batch = objective.collate(pair_examples(4))
    before = objective.loss(model, batch).losses["pairs"]
    raw = raw_score(model, batch)
    model.head.reward_mean.fill_(3.0)
    model.head.reward_std.fill_(0.2)
    torch.testing.assert_close(score(model, batch), (raw - 3) / 0.2)
    torch.testing.assert_close(raw_score(model, batch), raw)
    torch.testing.assert_close(objective.loss(model, batch).losses["pairs"], before)


# --- what is measured ---


def test_reliability_and_calibration_by_hand():
    confidences = [0.55, 0.65, 0.62, 0.95, 0.95, 1.0]
    outcomes = [True, False, True, True, True, False]
    bins = reliability(confidences, outcomes)
    assert [(b.low, b.count) for b in bins] == [(0.5, 1), (0.6, 2), (0.9, 3)]
    assert [b.accuracy for b in bins] == [1, 0.5, pytest.approx(2 / 3)]
    by_hand = (1 * 0.45 + 2 * abs(0.635 - 0.5) + 3 * abs(2.9 / 3 - 2 / 3)) / 6
    assert expected_calibration_error(confidences, outcomes) == pytest.approx(by_hand)


def test_area_under_roc_and_slope_against_brute_force():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, 40).astype(float)
    positive = rng.random(40) < 0.4
    pairs = [(a, b) for a in scores[positive] for b in scores[~positive]]
    brute = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    assert area_under_roc(scores.tolist(), positive.tolist()) == pytest.approx(brute)
    x = rng.normal(size=4000)
    covered = []
    for _ in range(40):
        noise = rng.normal(size=4000) * (0.2 + x**2)  # its size depends on x
        slope, low, high = slope_through_origin(x.tolist(), (0.3 * x + noise).tolist())
        covered.append(low < 0.3 < high)
        assert slope == pytest.approx(np.linalg.lstsq(x[:, None], 0.3 * x + noise, rcond=None)[0][0])  # fmt: skip
    assert 34 <= sum(covered) <= 40


def test_a_model_that_is_swayed_by_padding_is_found_out():
    model = tiny_decoder("last").double()
    objective = Reward(RewardOptions(), PAD_ID, model.join)
    pairs = pair_examples(12)
    found = judge(single_engine(model, trained=False), objective, pairs, 4)
    layouts = ("batch_of_one", "more_padding", "left_padding")
    assert all(found[f"eval/agreement/{name}"] == 1 for name in layouts)
    assert all(found[f"eval/gap/{name}"] < 1e-9 for name in layouts)
    assert sum(b["count"] for b in found["eval/reliability"]) == 12
    weight = model.head.weight

    def careless(hidden, batch):
        return (hidden[:, -1] * weight).sum(-1)

    model.head.scores = careless
    found = judge(single_engine(model, trained=False), objective, pairs, 4)
    assert found["eval/gap/batch_of_one"] > 0.1
    assert found["eval/gap/more_padding"] > 0.1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    result = run_tiny(
        folder, ["stage=reward", *SKILLS, "train.max_steps=3", "stage.center_coef=0.01"]
    )
    return folder, result


def test_normalisation_is_saved_with_the_model(trained):
    folder, result = trained
    model, _ = load_model(folder / "model")
    assert model.head.reward_std.item() not in (0.0, 1.0)
    assert (
        abs(result.metrics["after/loss"] - math.log(2)) < 0.5
    )  # in raw units, whatever the spread
    # Training goes on from it: mean and spread are those of the raw scores again.
    again = run_tiny(
        folder.parent / "again",
        ["stage=reward", *SKILLS, "train.max_steps=1", "optim.lr=1e-9", f"model={folder}/model"],
    )
    model_again, _ = load_model(again.run_dir / "model")
    assert model_again.head.reward_std.item() == pytest.approx(model.head.reward_std.item(), rel=1e-3)  # fmt: skip
    assert model_again.head.reward_mean.item() == pytest.approx(model.head.reward_mean.item(), abs=1e-3)  # fmt: skip


def test_evaluate_tells_all_of_it(trained, tmp_path, capsys):
    folder, _ = trained
    plot = tmp_path / "plots" / "reliability.svg"
    capsys.readouterr()
    assert main(["evaluate", f"model={folder}/model", *TINY, *SKILLS, f"plot={plot}"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy_low"] <= told["accuracy"] <= told["accuracy_high"]
    assert 0 <= told["ece"] <= 1
    assert told["reliability"][0].keys() == {"low", "high", "confidence", "accuracy", "count"}
    assert told["agreement/left_padding"] == told["agreement/batch_of_one"] == 1.0
    assert told["gap/more_padding"] < 1e-3
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert reward.Reward.records == "pairs"
