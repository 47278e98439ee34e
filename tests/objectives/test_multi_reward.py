"""A reward model with a score per objective: the loss by numpy, rows read, a toy learned, saved, and used as a reward."""

import json
import re
from random import Random

import numpy as np
import pytest
import torch
from patched import planted

from distllm import load_model, save_model
from distllm.cli.main import main
from distllm.data.chat import encode_answer, encode_prompt
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.data.tokenizer import load_tokenizer
from distllm.errors import ConfigError, DataError
from distllm.objectives import multi_reward
from distllm.objectives.multi_reward import MultiReward, MultiRewardOptions, objective_scores
from distllm.rl.options import RLOptions
from distllm.rl.rewards.base import RewardContext, build_reward
from distllm.testing.rl import make_rollout
from distllm.testing.stages import TINY, run_tiny
from distllm.testing.tiny import PAD_ID, pair_examples, single_engine, tiny_decoder

NAMES = ["harmless", "helpful", "short"]
LETTERS, DIGITS = "abcdefgh", "12345678"


def losses_of(scores, chances):
    """Return what the objective says of pairs whose answers a stub scores: scores [2, pairs, objectives]."""
    pairs = pair_examples(len(chances))
    for pair, told in zip(pairs, chances, strict=True):
        pair.objectives = told
    model = tiny_decoder("classify").double()
    objective = MultiReward(MultiRewardOptions(), PAD_ID, model.join, NAMES)
    batch = objective.collate(pairs)
    flat = torch.from_numpy(scores).flatten(0, 1)
    model.head.logits = lambda hidden, mask: flat
    out = objective.loss(model, batch)
    return out.losses["comparisons"].item(), objective.weights(batch), out.metrics


def check_loss():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 4, 3)) * 3
    chances = [{"harmless": 1.0, "helpful": 0.0}, {"short": 0.75}, {"helpful": 0.5}, dict.fromkeys(NAMES, 1.0)]  # fmt: skip
    by_hand, count = 0.0, 0
    for pair, told in enumerate(chances):
        for k, name in enumerate(NAMES):
            if name in told:
                d, p = scores[0, pair, k] - scores[1, pair, k], told[name]
                by_hand += p * np.log1p(np.exp(-d)) + (1 - p) * np.log1p(np.exp(d))
                count += 1
    loss, weights, metrics = losses_of(scores, chances)
    assert loss == pytest.approx(by_hand, rel=1e-12)
    assert weights["comparisons"] == count == 7
    # `helpful` compares the first pair, the other way round, and the last; the third it calls equal.
    margins = scores[0, :, 1] - scores[1, :, 1]
    hits, told = metrics["accuracy/helpful"]
    assert told == 2 and hits == (margins[0] < 0) + (margins[3] > 0)


def test_loss_by_numpy():
    check_loss()
    bug = (
        "(smoothed_log_sigmoid(margins, chances) * compared)",
        "smoothed_log_sigmoid(margins, chances)",
    )
    with planted(multi_reward, *bug), pytest.raises(AssertionError):
        check_loss()


def write(path, count, seed=0):
    """Answers are a letter and a digit: `late` prefers the later letter, `small` the smaller digit; each is told for most."""
    rng = Random(seed)
    with path.open("w") as file:
        for n in range(count):
            (a, x), (b, y) = ((rng.choice(LETTERS), rng.choice(DIGITS)) for _ in range(2))
            if a == b or x == y:
                continue
            told = {"late": float(a > b), "small": float(x < y)}
            if rng.random() < 0.3:
                told[rng.choice(["late", "small"])] = None
            row = {"prompt": f"{n}", "chosen": f"{a} {x}", "rejected": f"{b} {y}"}
            file.write(json.dumps(row | {"objectives": told}) + "\n")
    return path


def overrides(path):
    return [
        "stage=multi_reward", "data=file", f"data.path='{path}'", "data.units=word", "arch.vocab_size=64",
        "train.global_batch_size=32", "train.micro_batch_size=32", "optim.lr=1e-2", "train.num_eval_samples=128",
        "data.heldout_fraction=0.1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    path = write(folder / "pairs.jsonl", 1500)
    return path, run_tiny(folder / "run", [*overrides(path), "train.max_steps=60"])


def test_each_objective_is_learned(learned):
    """They are independent, so one score for both could not have judged more than 3/4 of the comparisons."""
    metrics = learned[1].metrics
    for name in ("late", "small"):
        assert metrics[f"before/{name}/accuracy"] < 0.75 < 0.9 < metrics[f"after/{name}/accuracy"]
        assert metrics[f"after/{name}/accuracy_low"] < metrics[f"after/{name}/accuracy"]
        assert 60 < metrics[f"after/{name}/num_pairs"] < 128
    assert metrics["after/loss"] < 0.35 < metrics["before/loss"]


def test_saved_read_by_transformers_and_evaluated(learned, capsys):
    transformers = pytest.importorskip("transformers")
    path, result = learned
    folder = result.run_dir / "model"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.id2label == {0: "late", 1: "small"}
    model, tok = load_model(folder)
    ids = torch.tensor([tok("h 1", add_special_tokens=False).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)  # fmt: skip
    capsys.readouterr()
    assert main(["evaluate", f"model={folder}", *TINY, *overrides(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["small/accuracy"] == pytest.approx(result.metrics["after/small/accuracy"])


def judge(folder, tok, weights, **options):
    """Build the reward that `stage.reward_model` and `stage.reward_weights` ask for."""
    context = RewardContext(
        options=RLOptions(reward_model=str(folder), reward_weights=weights, **options),
        function="", log=None, tokenizer=tok, join=None, pad_id=tok.pad_token_id, batch_size=3,
        load=lambda path: load_model(path)[0], freeze=lambda model: single_engine(model, trained=False),
    )  # fmt: skip
    return build_reward(context)


def test_as_a_reward_the_scores_are_weighted(learned):
    """All answers ranked by one objective or the other, and a weighted sum equal to the model's own scores."""
    folder = learned[1].run_dir / "model"
    tok = load_tokenizer(folder)
    prompt_ids = encode_prompt(tok, [{"role": "user", "content": "7"}])
    answers = [(letter, digit) for letter in LETTERS for digit in DIGITS]
    rollouts = [make_rollout(prompt_ids, encode_answer(tok, f"{a} {x}")) for a, x in answers]

    def scores(**weights):
        return np.array(judge(folder, tok, weights).score([], rollouts, []))

    late, small = (np.array(values) for values in zip(*answers, strict=True))
    by_late, by_small = scores(late=1), scores(small=1)
    assert by_late[late == "a"].max() < by_late[late == "h"].min()
    assert by_small[small == "8"].max() < by_small[small == "1"].min()
    np.testing.assert_allclose(scores(late=0.5, small=-2), 0.5 * by_late - 2 * by_small, rtol=1e-4, atol=1e-4)  # fmt: skip
    model = load_model(folder)[0].eval()
    batch = model.join([prompt_ids], [rollouts[5].response_ids], tok.pad_token_id)
    with torch.no_grad():
        alone = objective_scores(model, batch)[0]
    assert by_late[5] == pytest.approx(alone[0].item(), abs=1e-4)
    assert by_small[5] == pytest.approx(alone[1].item(), abs=1e-4)


def test_weights_that_do_not_fit_are_refused(learned, tmp_path):
    folder = learned[1].run_dir / "model"
    tok = load_tokenizer(folder)
    for weights, words in [({}, "{late:1,small:1}"), ({"lat": 1}, "each of late, small")]:
        with pytest.raises(ConfigError, match=re.escape(words)):
            judge(folder, tok, weights, reward="model")
    save_model(tiny_decoder("last", vocab_size=len(tok)), tok, tmp_path / "one")
    with pytest.raises(ConfigError, match="has one score"):
        judge(tmp_path / "one", tok, {"late": 1})


@pytest.mark.parametrize(
    ("objectives", "word"),
    [
        ([1, 0], "objectives is"),
        ({"late": 2}, "objectives.late is 2, must be from 0"),
        ({"late": "much"}, "late is str 'much', must be a number"),
        ({"late": None}, "compares nothing"),
        ({}, "compares nothing"),
    ],
)
def test_a_bad_row_is_named(tmp_path, objectives, word):
    file = tmp_path / "bad.jsonl"
    row = {"prompt": "?", "chosen": "a", "rejected": "b", "objectives": objectives}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=word) as caught:
        _ = open_source(DataOptions(name="file", path=str(file)), 0).serves
    assert "bad.jsonl" in str(caught.value)


def test_what_the_rows_are_taken_for(learned, tmp_path):
    source = open_source(DataOptions(name="file", path=str(learned[0])), 0)
    assert source.serves == ("compared", "pairs", "unpaired", "prompts")
    assert set(source.compared("train")[0].objectives) <= {"late", "small"}
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"prompt": "?", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(ConfigError, match=r"from which compared \(stage=multi_reward\) cannot be"):
        open_source(DataOptions(name="file", path=str(plain), heldout_fraction=0), 0).compared(
            "train"
        )
