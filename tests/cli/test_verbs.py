"""Each verb on real input, in this process; `train` also as a process that is told to stop."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distllm import load_model
from distllm.cli.main import VERBS, main
from distllm.config.files import CHOOSABLE, options_in
from distllm.testing.gloo import patient

TINY = ["arch.vocab_size=300", "arch.d_model=16", "arch.n_layers=2", "arch.d_ff=24", "train.seq_len=32",
        "train.global_batch_size=4", "train.micro_batch_size=4", "train.precision=fp32"]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Write 60 documents of made-up words."""
    random_words = random.Random(0)
    words = ["".join(random_words.choices("abcdefgh", k=4)) for _ in range(50)]
    texts = [" ".join(random_words.choices(words, k=60)) for _ in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def run_dir(corpus, tmp_path_factory) -> Path:
    """Train a tiny model with the verb itself."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    code = main(["train", "data=file", f"data.path={corpus}", "train.max_steps=6",
                 "train.log_every_steps=2", f"run.dir={folder}", *TINY])  # fmt: skip
    assert code == 0
    return folder


def output(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def mistake(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_list_shows_every_option_with_its_description(capsys):
    text = output(capsys, "list")
    for group in CHOOSABLE:
        assert f"\n{group}\n" in f"\n{text}"
        rest = f"\n{text}".partition(f"\n{group}\n")[2].splitlines()
        lines = list(itertools.takewhile(lambda x: x.startswith(" "), rest))
        for option in options_in(group):
            (line,) = {x for x in lines if x.startswith(f"  {option} ")}
            assert len(line.split(maxsplit=1)[1]) > 10, f"{group}={option} says nothing of itself"
    assert "cosine" not in output(capsys, "list", "stage")
    assert "Did you mean arch?" in mistake(capsys, "list", "archs")


def test_explain(capsys):
    text = output(capsys, "explain", "optim.lr", "optim.lr=0.01")
    for word in ("optim.lr=0.01", "optim.lr=0.01 as typed", "0.001", "a number", "same"):
        assert word in text
    assert "stage.gae_lambda=0.95" in output(capsys, "explain", "stage", "stage=ppo")
    assert len(output(capsys, "explain").splitlines()) > 50
    assert "optim.lr?" in mistake(capsys, "explain", "optim.lrr")


def test_plan_prints_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = output(capsys, "plan", "train.global_batch_size=64", "train.micro_batch_size=16")
    rows = {line[2:39].strip(): line[39:].strip() for line in text.splitlines()}
    assert rows["x grad_accum_steps"] == "4"
    assert rows["peak"].endswith("MiB") and rows["multiplied"] == "3,997,696"
    assert rows["per token, full attention"] == "27.1 MFLOP"
    assert rows["per token, causal half"] == "25.6 MFLOP"
    assert list(tmp_path.iterdir()) == []
    assert "train.global_batch_size=65" in mistake(capsys, "plan", "train.global_batch_size=65")


def test_plan_for_scripts_and_with_a_tokenizer(capsys, corpus, run_dir):
    plan = json.loads(output(capsys, "plan", "format=json", "data=file", f"data.path={corpus}", *TINY,
                             f"model={run_dir / 'model'}"))  # fmt: skip
    assert plan["parameters"]["total"] == sum(
        p.numel() for p in load_model(run_dir / "model")[0].parameters()
    )
    assert plan["batch"]["rows to learn from"] > 10
    assert "nowhere.txt does not exist" in mistake(capsys, "plan", "data=file", "data.path=nowhere.txt",
                                                   f"model={run_dir / 'model'}")  # fmt: skip
    assert "Did you mean json?" in mistake(capsys, "plan", "format=jso")


def test_plan_of_a_pipeline(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = output(capsys, "plan", "pipeline=demo", "pipeline.rounds=2")
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert {"pretrain", "sft", "reward", "ppo", "grpo", "reward-2", "grpo-2"} <= set(rows)
    assert rows["ppo"].split("│")[2:4] == rows["ppo-2"].split("│")[2:4]
    assert "MiB" in rows["pretrain"] and list(tmp_path.iterdir()) == []


def test_train_leaves_a_model(run_dir):
    assert (run_dir / "model/model.safetensors").is_file()
    assert (run_dir / "config.yaml").is_file()
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_train_refuses_what_cannot_work(capsys, tmp_path):
    where = f"run.dir={tmp_path / 'never'}"
    assert "stage=sft learns from dialogues" in mistake(capsys, "train", "stage=sft", where)
    assert "is not a directory" in mistake(capsys, "train", "model=nowhere", where)
    assert not (tmp_path / "never").exists()


def test_a_signal_stops_training_with_3_and_a_second_start_finishes(corpus, tmp_path):
    command = [sys.executable, "-m", "distllm", "train", "data=file", f"data.path={corpus}",
               f"run.dir={tmp_path / 'run'}", "train.log_every_steps=1", "train.max_steps=100000", *TINY]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + patient(90)
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3, process.communicate()
    (newest,) = sorted((tmp_path / "run/checkpoints").glob("step_*"))[-1:]
    done = int(newest.name.removeprefix("step_"))
    assert done >= 3 and not (tmp_path / "run/model").exists()
    again = [*command, f"train.max_steps={done + 2}"]
    assert subprocess.run(again, capture_output=True, timeout=patient(120)).returncode == 0
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == done + 2


def test_evaluate_prints_json(capsys, corpus, run_dir, tmp_path):
    out = tmp_path / "result.json"
    text = output(capsys, "evaluate", f"model={run_dir / 'model'}", "data=file", f"data.path={corpus}",
                  f"out={out}", *TINY)  # fmt: skip
    assert json.loads(text) == json.loads(out.read_text())
    assert any("loss" in key for key in json.loads(text))
    assert "model=DIR" in mistake(capsys, "evaluate", "data=stdlib")


def test_export_is_read_by_transformers(capsys, run_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "exported"
    output(capsys, "export", f"model={run_dir / 'model'}", f"out={out}")
    ids = torch.tensor([[5, 9, 200, 31]])
    theirs = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    ours = load_model(run_dir / "model")[0](ids).logits
    assert (theirs - ours).abs().max() < 1e-4
    assert f"out={out} exists" in mistake(
        capsys, "export", f"model={run_dir / 'model'}", f"out={out}"
    )
    assert "needs out=" in mistake(capsys, "export", f"model={run_dir / 'model'}")
    assert "model=DIR" in mistake(capsys, "export", f"out={tmp_path / 'other'}")
    assert "Did you mean out?" in mistake(capsys, "export", "out=x", "outt=y")


def test_tokenizer(capsys, corpus, tmp_path):
    from transformers import AutoTokenizer

    out = tmp_path / "tokenizer"
    text = output(
        capsys, "tokenizer", "data=file", f"data.path={corpus}", "vocab_size=290", f"out={out}"
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == 290 and "290 tokens" in text
    assert tokenizer.decode(tokenizer("abcd efgh").input_ids) == "abcd efgh"
    assert "exists" in mistake(
        capsys, "tokenizer", "data=file", f"data.path={corpus}", f"out={out}"
    )
    text = mistake(capsys, "tokenizer", "vocab_size=many", f"out={tmp_path / 'b'}")
    assert "vocab_size=many is not an integer" in text
    assert "vocab_size?" in mistake(capsys, "tokenizer", "vocab_sise=9", f"out={tmp_path / 'b'}")


@pytest.mark.parametrize(
    "settings, tokens",
    [
        ("arch=bert_tiny", ("[CLS]", "[SEP]", "[MASK]")),
        ("arch=t5_tiny", ("[S2S]", "<extra_id_0>", "<extra_id_99>")),
        ("arch=glm_tiny", ("[gMASK]", "<|startofpiece|>")),
        ("stage.fim_rate=0.5", ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")),
    ],
)
def test_a_tokenizer_holds_what_the_objective_needs(capsys, corpus, tmp_path, settings, tokens):
    """Without it no corpus could be tokenised into shards for a masked model."""
    from transformers import AutoTokenizer

    out = tmp_path / "tokenizer"
    of = ["data=file", f"data.path={corpus}", "vocab_size=400", f"out={out}"]
    output(capsys, "tokenizer", settings, *of)
    known = AutoTokenizer.from_pretrained(out).get_vocab()
    assert set(tokens) <= known.keys() and len(known) <= 400


def test_data_counts_and_shows(capsys, corpus, run_dir):
    tokenizer = f"tokenizer={run_dir / 'model'}"
    text = output(capsys, "data", "stats", "data=file", f"data.path={corpus}", tokenizer)
    train, heldout = (line for line in text.splitlines() if "train" in line or "heldout" in line)
    assert "documents" in train
    numbers = [int(line.split("│")[2].replace(",", "")) for line in (train, heldout)]
    assert sum(numbers) == 60 and numbers[1] >= 1

    text = output(
        capsys, "data", "show", "data=skills", "data.tasks=[copy_words]", tokenizer, "count=1"
    )
    dialogue = next(line for line in text.splitlines() if "<|assistant|>" in line)
    prompt, answer = dialogue.split("<|assistant|>")
    assert answer.startswith("[[") and answer.endswith("<|end|>]]") and "[[" not in prompt
    assert f"chosen:   [[{answer[2:].split('<|end|>')[0]}" in text
    unpaired = text[text.index("unpaired (train)") :]
    assert "good: [[" in unpaired or "bad: [[" in unpaired
    assert "Did you mean show?" in mistake(capsys, "data", "shwo")
    assert "heldout" in mistake(capsys, "data", "show", "split=test")
    assert "count=x" in mistake(capsys, "data", "show", "count=x")


@pytest.mark.filterwarnings("ignore:.*partly memory")  # one row serves both splits
@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"tokens": ["Bob", "ran"], "tags": ["B-PER", "O"]}, "Bob/B-PER ran/O"),
        ({"source": "walk twice", "target": "WALK WALK"}, "WALK WALK"),
        ({"prompt": "Say hi", "completion": "hi", "label": True}, "good: [[hi]]"),
        ({"prompt": "Say hi", "completion": "no", "label": False}, "bad: [[no]]"),
    ],
)
def test_data_shows_every_kind(capsys, tmp_path, run_dir, row, shown):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    settings = ["data=file", f"data.path={path}", f"data.heldout_path={path}"]
    text = output(capsys, "data", "show", *settings, f"tokenizer={run_dir / 'model'}")
    assert shown in text
    assert output(capsys, "data", "stats", *settings, f"tokenizer={run_dir / 'model'}")


def test_report_writes_one_file(capsys, run_dir, tmp_path):
    out = tmp_path / "report.html"
    assert output(capsys, "report", str(run_dir), f"out={out}").strip() == str(out)
    assert out.read_text().lstrip().lower().startswith("<!doctype html>")
    output(capsys, "report", str(run_dir))
    assert (run_dir / "report.html").is_file()
    assert "nowhere is not a directory" in mistake(capsys, "report", "nowhere")
    assert "needs the directory" in mistake(capsys, "report")
    assert "outt=x" in mistake(capsys, "report", str(run_dir), "outt=x")


def test_a_pipeline_must_be_chosen(capsys):
    text = mistake(capsys, "pipeline")
    assert "pipeline=none has no stages" in text and "demo" in text
    assert "Did you mean demo?" in mistake(capsys, "pipeline", "pipeline=demp")


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"list", "doctor", "report"}))
def test_every_verb_suggests_the_nearest_key(verb, capsys, tmp_path):
    needed = {
        "tokenizer": ["out=x"],
        "export": ["out=x"],
        "import": ["out=x"],
        "generate": ["prompt=x"],
        "explain": ["optim.lr"],
    }
    text = mistake(capsys, verb, *needed.get(verb, []), "optim.lrr=3")
    assert "optim.lrr" in text and "optim.lr?" in text
