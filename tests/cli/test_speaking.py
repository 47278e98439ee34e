"""`distllm generate` and `distllm chat`, from command line to text, against an argmax loop."""

import io
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.io import load_model, save_model
from distllm.cli import chat as chat_verb
from distllm.cli.main import main
from distllm.data.chat import encode_prompt, end_ids
from distllm.data.tokenizer import train_tokenizer
from distllm.testing.gloo import patient

QUICK = ["train.precision=fp32", "hardware.threads=1"]
CONTEXT = 96


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and looked at the dog, 1 2 3"] * 5, 300)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "with space"
    shape = {"vocab_size": len(tokenizer), "d_model": 32, "n_layers": 2, "n_heads": 2}
    options = DecoderOptions(**shape, n_kv_heads=1, d_ff=48, max_seq_len=CONTEXT, init_std=0.3)
    save_model(Decoder(options, seed=3), tokenizer, path)
    return path


def argmax_ids(folder, prompt_ids, max_new_tokens):
    """Greedy answer by full forwards over the growing sequence."""
    model, tokenizer = load_model(folder)
    ids = list(prompt_ids)
    while len(ids) < min(len(prompt_ids) + max_new_tokens, CONTEXT):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in end_ids(tokenizer):
            break
    return ids[len(prompt_ids) :]


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def generate(folder, *arguments):
    return main(["generate", f"model={folder}", *QUICK, *arguments])


def feed(monkeypatch, text):
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def chat(folder, *arguments):
    return main(
        ["chat", f"model={folder}", *QUICK, "temperature=0", "max_new_tokens=12", *arguments]
    )


def test_generate_continues_plain_text(folder, tokenizer, capsys):
    assert generate(folder, "prompt=the cat = dog, 1", "temperature=0", "max_new_tokens=20") == 0
    prompt_ids = tokenizer("the cat = dog, 1").input_ids
    expected = text_of(tokenizer, argmax_ids(folder, prompt_ids, 20))
    assert capsys.readouterr().out == expected + "\n"


def test_generate_answers_with_the_chat_template(folder, tokenizer, capsys):
    arguments = ["prompt=sort <|end|> 3 1 2", "chat=true", "temperature=0", "max_new_tokens=20"]
    assert generate(folder, *arguments) == 0
    prompt_ids = encode_prompt(tokenizer, [{"role": "user", "content": "sort <|end|> 3 1 2"}])
    expected = text_of(tokenizer, argmax_ids(folder, prompt_ids, 20))
    assert capsys.readouterr().out == expected + "\n"


def test_generate_samples_by_seed(folder, capsys):
    outputs = []
    for seed in (1, 1, 2):
        assert (
            generate(folder, "prompt=the", "num_samples=3", f"seed={seed}", "max_new_tokens=9") == 0
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    heads = [line for line in outputs[0].splitlines() if line.startswith("--- ")]
    assert [head[:10] for head in heads] == ["--- 1 of 3", "--- 2 of 3", "--- 3 of 3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "prompt=a", "model=/no/such/place"],
            "model=/no/such/place is not a directory",
        ),
        (["chat", "model=/no/such/place"], "model=/no/such/place is not a directory"),
        (["generate", "prompt=a"], "needs model=DIR"),
        (["generate", "model=FOLDER"], "needs prompt=..."),
        (
            ["generate", "model=FOLDER", "prompt=a", "chat=maybe"],
            "chat=maybe is neither true nor false",
        ),
        (
            ["generate", "model=FOLDER", "prompt=a", "num_samples=0"],
            "num_samples=0 must be at least 1",
        ),
        (["generate", "model=FOLDER", "prompt=a", "temperatur=1"], "temperature"),
        (["generate", "model=FOLDER", "prompt=a", "top_p=2"], "generation.top_p"),
        (["generate", "model=FOLDER", f"prompt={'1 ' * CONTEXT}"], f"reads at most {CONTEXT}"),
    ],
)
def test_mistakes_are_messages(folder, arguments, message, capsys):
    words = [word.replace("FOLDER", str(folder)) for word in arguments]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_reward_model_does_not_speak(folder, tokenizer, tmp_path, capsys):
    model, _ = load_model(folder, head="last")
    save_model(model, tokenizer, tmp_path / "judge")
    assert generate(tmp_path / "judge", "prompt=a") == 2
    assert "has the head last: it judges text and writes none" in capsys.readouterr().err


def test_a_model_without_tokenizer_names_the_way_out(folder, tokenizer, tmp_path, capsys):
    model, _ = load_model(folder)
    save_model(model, None, tmp_path / "bare")
    assert generate(tmp_path / "bare", "prompt=the") == 2
    assert "holds no tokenizer.json. Give one with tokenizer=DIR" in capsys.readouterr().err
    assert generate(tmp_path / "bare", "prompt=the", f"tokenizer={folder}") == 0


def test_chat_through_a_pipe_remembers(folder, tokenizer, monkeypatch, capsys):
    """Two turns, a reset, the first turn again; blank lines and all after /exit are skipped."""
    feed(monkeypatch, "the cat\n\n   \nthe dog\n/reset\nthe cat\n/exit\nthe mat\n")
    assert chat(folder) == 0
    messages, answers = [], []
    for question in ("the cat", "the dog"):
        messages.append({"role": "user", "content": question})
        ids = argmax_ids(folder, encode_prompt(tokenizer, messages), 12)
        answers.append(text_of(tokenizer, ids))
        messages.append({"role": "assistant", "content": answers[-1]})
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{a}\n" for a in (*answers, answers[0]))
    assert captured.err == "The conversation starts anew.\n"


def test_chat_puts_the_system_message_first(folder, tokenizer, monkeypatch, capsys):
    feed(monkeypatch, "the cat")  # no newline at the end of input
    assert chat(folder, "system=on the mat") == 0
    messages = [
        {"role": "system", "content": "on the mat"},
        {"role": "user", "content": "the cat"},
    ]
    expected = text_of(tokenizer, argmax_ids(folder, encode_prompt(tokenizer, messages), 12))
    assert capsys.readouterr().out == expected + "\n"


def test_chat_drops_the_oldest_turns(folder, tokenizer, monkeypatch, capsys):
    """Every prompt fits; the newest message is always there; the user is told."""
    seen = []
    encode = chat_verb.speaker.Speaker.stream

    def spy(self, prompt_ids, turn):
        seen.append(prompt_ids)
        return encode(self, prompt_ids, turn)

    monkeypatch.setattr(chat_verb.speaker.Speaker, "stream", spy)
    questions = [f"the cat sat on the mat, {i} 1 2 3" for i in range(8)]
    feed(monkeypatch, "\n".join(questions) + "\n")
    assert chat(folder, "system=the dog") == 0
    err = capsys.readouterr().err
    assert (
        f"no longer fits the model's {CONTEXT} tokens. Dropped: the 1 oldest question and answer."
        in err
    )
    assert len(seen) == 8 and max(map(len, seen)) + 12 <= CONTEXT
    for question, prompt_ids in zip(questions, seen, strict=True):
        shown = tokenizer.decode(prompt_ids)
        assert shown.startswith("<|system|>the dog<|end|><|user|>")
        assert shown.endswith(f"<|user|>{question}<|end|><|assistant|>")
    assert "cat sat on the mat, 0 1" not in tokenizer.decode(seen[-1])
    assert "cat sat on the mat, 6 1" in tokenizer.decode(seen[-1])


def test_chat_goes_on_after_a_message_that_is_too_long(folder, tokenizer, monkeypatch, capsys):
    feed(monkeypatch, "1 " * CONTEXT + "\nthe cat\n")
    assert chat(folder) == 0
    captured = capsys.readouterr()
    assert f"reads at most {CONTEXT}" in captured.err
    messages = [{"role": "user", "content": "the cat"}]
    expected = text_of(tokenizer, argmax_ids(folder, encode_prompt(tokenizer, messages), 12))
    assert captured.out == expected + "\n"


def test_chat_survives_bytes_that_are_no_text(folder, monkeypatch, capsys):
    feed(monkeypatch, b"the \xff\xfe cat\n/exit\n")
    assert chat(folder) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_chat_without_a_template(folder, tokenizer, tmp_path, capsys):
    model, plain = load_model(folder)
    plain.chat_template = None
    save_model(model, plain, tmp_path / "plain")
    assert chat(tmp_path / "plain") == 2
    assert "needs a tokenizer with a chat template" in capsys.readouterr().err


def test_chat_in_a_terminal(folder, tokenizer):
    """A real pseudo-terminal: it asks, answers, and ends with Ctrl-D and exit code 0."""
    ours, theirs = pty.openpty()
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "distllm", "chat", f"model={folder}", *QUICK, "temperature=0"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=root,
        env=os.environ | {"TERM": "dumb", "PYTHONPATH": str(root)},
    )
    os.close(theirs)
    try:
        shown = _read_until(ours, "you> ")
        assert "/reset starts anew" in shown
        os.write(ours, b"the cat\n")
        shown = _read_until(ours, "you> ")
        messages = [{"role": "user", "content": "the cat"}]
        ids = argmax_ids(folder, encode_prompt(tokenizer, messages), 64)
        expected = text_of(tokenizer, ids).strip()
        assert expected
        assert "".join(expected.split()) in "".join(shown.split())
        os.write(ours, b"\x04")
        assert process.wait(timeout=patient(30)) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(terminal, mark, limit_s=90):
    shown, start = "", time.monotonic()
    while mark not in shown:
        assert time.monotonic() - start < patient(limit_s), shown
        shown += os.read(terminal, 4096).decode(errors="replace")
    return shown
