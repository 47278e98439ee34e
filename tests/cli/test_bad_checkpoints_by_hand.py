"""Damaged checkpoints of every family, as a user meets them at the command line: exit code 2 and one message with the values."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm.arch.hf.family import families
from distllm.cli.main import main
from distllm.testing import parity

pytest.importorskip("transformers")

FAMILIES = sorted(n for n, f in families().items() if f.tiny)
QUICK = ("bert", "gpt2", "llama", "marian", "qwen3_moe", "t5")


class Harmful:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def refused(folder, tmp_path, capsys):
    """Import the directory, which must fail without a trace of a model; return what is said, on one line."""
    out = tmp_path / "out"
    assert main(["import", f"model={folder}", f"out={out}"]) == 2
    assert not out.exists()
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_a_damaged_checkpoint_is_refused_in_words(name, tmp_path, capsys):
    folder = parity.save(parity.reference(families()[name]), tmp_path / "m")
    path = folder / "model.safetensors"
    whole = load_file(path)
    gone, cut = sorted(n for n, t in whole.items() if t.ndim == 2 and n.endswith("weight"))[:2]
    bad = {n: t for n, t in whole.items() if n != gone} | {
        cut: whole[cut][:-1].contiguous(),
        "model.vision.weight": torch.zeros(3),
    }
    save_file(bad, path, metadata={"format": "pt"})
    said = refused(folder, tmp_path, capsys)
    shape, own = list(bad[cut].shape), list(whole[cut].shape)
    assert "missing: " in said and gone in said
    assert "1 not part of the model: model.vision.weight" in said
    if (
        cut in said
    ):  # experts that are stored apart, and matrices that are stored turned, are named as we hold them
        assert str(shape) in said or str(shape[::-1]) in said
        assert str(own) in said or str(own[::-1]) in said
    else:
        assert "wrong shape" in said or "shape" in said

    save_file(whole, path, metadata={"format": "pt"})
    os.truncate(path, path.stat().st_size // 2)
    said = refused(folder, tmp_path, capsys)
    assert "model.safetensors" in said and "damaged or cut short" in said

    path.unlink()
    trace = tmp_path / "trace"
    torch.save({**whole, "x": Harmful(str(trace))}, folder / "pytorch_model.bin")
    said = refused(folder, tmp_path, capsys)
    assert "pytorch_model.bin is a pickle" in said and not trace.exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["arch=bert_tiny", "train.seq_len=4096"], ("train.seq_len=4096", "max_seq_len=")),
        (["arch=t5_tiny", "train.seq_len=4096"], ("train.seq_len=4096", "max_seq_len=")),
        (["arch=bert_tiny", "stage.objective=clm"], ("stage.objective=clm", "mlm")),
        (["arch=llama_tiny", "stage.objective=mlm"], ("stage.objective=mlm", "clm")),
        (["arch=t5_tiny", "stage.objective=clm"], ("stage.objective=clm", "span")),
        (["arch=glm_tiny", "stage.objective=span"], ("stage.objective=span", "blank")),
        (["arch=lstm_tiny", "stage.objective=blank"], ("stage.objective=blank", "clm")),
    ],
    ids=str,
)
def test_what_an_architecture_cannot_do_is_refused_before_it_starts(
    overrides, words, tmp_path, capsys
):
    run = tmp_path / "run"
    assert main(["train", "stage=pretrain", *overrides, f"run.dir={run}"]) == 2
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "Traceback" not in said
    for word in words:
        assert word in said
