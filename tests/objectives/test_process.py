"""Process rewards: which tokens carry a verdict, the loss by numpy, a toy learned, and the file read by transformers."""

import json
import math
from random import Random

import numpy as np
import pytest
import torch
from patched import planted

from distllm import load_model
from distllm.cli.main import main
from distllm.data import labelled
from distllm.data.labelled import StepDataset
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.data.tokenizer import train_tokenizer
from distllm.errors import DataError
from distllm.objectives.process import Process, ProcessOptions
from distllm.pipeline.process import step_metrics
from distllm.testing.stages import TINY, run_tiny
from distllm.types import IGNORE_INDEX

LETTERS = "abcdefghijklmnop"


def write(path, count=1500, seed=0):
    """Count letters on from the prompt's; a step is right where it is the next letter."""
    rng, rows = Random(seed), []
    for _ in range(count):
        at, steps, labels = rng.randrange(len(LETTERS)), [], []
        start = at
        for _ in range(rng.randint(2, 5)):
            right = rng.random() < 0.6
            at = (at + 1 if right else at + rng.randint(2, len(LETTERS) - 2)) % len(LETTERS)
            steps.append(LETTERS[at])
            labels.append(right)
        rows.append({"prompt": LETTERS[start], "completions": steps, "labels": labels})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write(tmp_path_factory.mktemp("steps") / "steps.jsonl")


@pytest.fixture(scope="module")
def data(toy):
    source = open_source(DataOptions(name="file", path=str(toy)), 0)
    assert source.serves == ("stepwise",)
    tok = train_tokenizer([" ".join(LETTERS)] * 3, 300)
    return source.stepwise("train"), tok


def check_places(data):
    records, tok = data
    examples = StepDataset(records, tok, 64)
    for record, example in zip(records, examples, strict=True):
        assert len(example.places) == len(record.steps) == len(example.tags)
        text = "\n".join([record.prompt[0]["content"], *record.steps]) + "\n"
        assert tok.decode(example.input_ids).startswith(text)
        for number, place in enumerate(example.places):
            said = tok.decode(example.input_ids[: place + 1])
            assert said == "\n".join([record.prompt[0]["content"], *record.steps[: number + 1]]) + "\n"  # fmt: skip
            assert example.tags[number] == record.right[number]


def test_a_verdict_stands_at_the_last_token_of_its_step(data):
    check_places(data)
    bug = "ends.append(len(ids) - 1)", "ends.append(len(ids))"
    with planted(labelled, *bug), pytest.raises(AssertionError):
        check_places(data)


def test_loss_by_numpy(data):
    records, tok = data
    objective = Process(ProcessOptions(), tok.pad_token_id)
    examples = StepDataset(records, tok, 64)
    batch = objective.collate([examples[i] for i in range(7)])
    logits = torch.randn(*batch.input_ids.shape, 2, generator=torch.Generator().manual_seed(0))

    class Head:
        def logits(self, hidden):
            return logits

    class Model:
        head = Head()

        def __call__(self, **given):
            return type("Out", (), {"last_hidden_state": None})

    shifted = logits.numpy() - logits.numpy().max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    by_hand = -sum(
        logs[row, place, tag]
        for row in range(7)
        for place, tag in zip(examples[row].places, examples[row].tags, strict=True)
    )
    assert objective.loss(Model(), batch).losses["tag"].item() == pytest.approx(by_hand, rel=1e-5)
    steps = sum(len(records[i].steps) for i in range(7))
    assert objective.weights(batch)["tag"] == steps == (batch.labels != IGNORE_INDEX).sum()


def test_metrics_by_hand():
    judged = [[0.9, 0.2, 0.8], [0.6, 0.7], [0.4]]
    right = [[True, False, True], [True, False], [True]]
    found = step_metrics(judged, right)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["accuracy_low"] < 4 / 6 < found["accuracy_high"]
    assert found["first_error"] == pytest.approx(1 / 3)
    # Bins of a tenth: one in 0.6 to 0.7, one in 0.7 to 0.8, ..., each with its own hit or miss.
    assert 0 < found["ece"] < 0.5
    assert step_metrics([[0.9, 0.1]], [[True, False]])["first_error"] == 1


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"prompt": "a", "completions": ["b"], "labels": [True, False]}, "1 completions have 2 labels"),
        ({"prompt": "a", "completions": "b", "labels": [True]}, "completions is"),
        ({"prompt": "a", "completions": ["b"], "labels": ["yes"]}, r"labels\[1\] is"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path, row, word):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=word) as caught:
        _ = open_source(DataOptions(name="file", path=str(file)), 0).serves
    assert "bad.jsonl" in str(caught.value) and "1" in str(caught.value)


def overrides(toy):
    return [
        "stage=process", "data=file", f"data.path='{toy}'", "data.units=word", "arch.vocab_size=64",
        "arch.d_model=48", "arch.d_ff=96", "train.global_batch_size=32", "train.micro_batch_size=32",
        "optim.lr=3e-3", "train.num_eval_samples=64",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_judge_of_steps_learns(toy, tmp_path):
    """Steps are right in 60% of cases."""
    result = run_tiny(tmp_path / "run", [*overrides(toy), "train.max_steps=600"])
    before, after = (result.metrics[f"{when}/accuracy"] for when in ("before", "after"))
    assert before < 0.75 < 0.9 < after
    assert result.metrics["after/first_error"] > 0.75
    assert result.metrics["after/loss"] < 0.4 < math.log(2)


def test_a_judge_of_steps_is_evaluated_and_read_by_transformers(toy, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    result = run_tiny(tmp_path / "run", [*overrides(toy), "train.max_steps=2"])
    folder = tmp_path / "run" / "model"
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    assert theirs.config.id2label == {0: "wrong", 1: "right"}
    model, tok = load_model(folder)
    ids = torch.tensor([tok("c\nd\nf\n", add_special_tokens=False).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-4
        )
    capsys.readouterr()
    assert main(["evaluate", f"model={folder}", *TINY, *overrides(toy)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] == pytest.approx(result.metrics["after/accuracy"])
    assert told["accuracy_low"] <= told["accuracy"] <= told["accuracy_high"]
