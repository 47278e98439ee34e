"""Tokenised shards: the same rows as from texts, whole or found damaged, the same bytes however they were made."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from distllm.cli.main import main
from distllm.data.datasets import text_rows
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from distllm.errors import ConfigError, DataError
from distllm.testing.gloo import patient
from distllm.testing.stages import run_tiny

WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "old",
    "cat",
    "dog",
    "house",
    "runs",
    "sleeps",
    "eats",
    "over",
    "under",
    "with",
    "ü",
    "12",
    "345",
]


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distllm.pipeline.tokenize.BATCH_CHARACTERS", 2000)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, small_batches):
    """A folder with `text.jsonl` (a bad line in it), a tokenizer, and its shards in `shards`."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(400)]
    lines = [json.dumps({"text": t}) for t in texts]
    lines.insert(200, '{"text": 5}')
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    save_tokenizer(train_tokenizer(texts, 300), folder / "tokenizer")
    assert tokenize(folder, "shards") == 0
    return folder


def tokenize(folder, out, *more):
    return main(arguments(folder, out, *more))


def arguments(folder, out, *more):
    return [
        "data", "tokenize", f"path={folder}/text.jsonl", f"tokenizer={folder}/tokenizer", f"out={folder / out}",
        "data.on_bad_line=skip", "workers=1", "shard_tokens=1500", *more,
    ]  # fmt: skip


def both(corpus, seq_len=16, split="train", **shards):
    """(rows from texts, rows from shards)."""
    tok = load_tokenizer(corpus / "tokenizer")
    file = DataOptions(name="file", path=str(corpus / "text.jsonl"), on_bad_line="skip")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="1 of 401 records"):
        texts = text_rows(open_source(file, 0), tok, seq_len, split)
    options = DataOptions(name="shards", **({"path": str(corpus / "shards")} | shards))
    return texts, text_rows(open_source(options, 0), tok, seq_len, split)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.bin")}


@pytest.mark.parametrize("seq_len", [1, 7, 64, 5000])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_equal_those_from_texts(corpus, seq_len, split):
    manifest = json.loads((corpus / "shards/shards.json").read_text())
    assert len(manifest["shards"]["train"]) > 3, "rows must cross shards"
    assert (manifest["dtype"], manifest["bad"]) == ("uint16", 1)
    texts, shards = both(corpus, seq_len, split)
    assert len(texts) == len(shards) and len(texts) > 0
    for i in range(len(texts)):
        for name in ("input_ids", "labels", "segment_ids"):
            assert torch.equal(getattr(texts[i], name), getattr(shards[i], name)), (i, name)
    for a, b in zip(texts.documents(), shards.documents(), strict=True):
        assert np.array_equal(a, b)
    assert shards.bits_per_byte(2.0) == texts.bits_per_byte(2.0)


def test_the_bytes_do_not_depend_on_the_number_of_processes(corpus):
    assert tokenize(corpus, "parallel", "workers=2") == 0
    assert files_of(corpus / "parallel") == files_of(corpus / "shards")


def test_killed_and_started_again_it_writes_the_same_bytes(corpus, capsys):
    whole = files_of(corpus / "shards")
    assert len(whole) > 4
    code = "import sys; import distllm.pipeline.tokenize as t; t.BATCH_CHARACTERS = 2000\n"
    code += "from distllm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    killed = subprocess.run(
        [sys.executable, "-c", code, *arguments(corpus, "killed")],
        env=os.environ | {"DISTLLM_TEST_FAULT": "tokenize_before_manifest@3"},
        capture_output=True,
        timeout=patient(120),
    )
    assert killed.returncode == -9
    manifest = json.loads((corpus / "killed/shards.json").read_text())
    assert not manifest["is_complete"] and len(manifest["shards"]["train"]) == 2
    with pytest.raises(DataError, match=r"is unfinished\. Run the same"):
        both(corpus, path=str(corpus / "killed"))
    assert tokenize(corpus, "killed") == 0
    assert files_of(corpus / "killed") == whole
    again = json.loads((corpus / "killed/shards.json").read_text())
    wanted = json.loads((corpus / "shards/shards.json").read_text())
    assert again | {"seconds": 0} == wanted | {"seconds": 0}
    capsys.readouterr()
    assert tokenize(corpus, "killed", "shard_tokens=999") == 2
    assert "was begun with shard_tokens=1500, now it is 999" in capsys.readouterr().err


def test_a_flipped_bit_is_found_and_named(corpus, capsys):
    assert tokenize(corpus, "flipped") == 0
    path = corpus / "flipped/train-00001.bin"
    damaged = bytearray(path.read_bytes())
    damaged[1001] ^= 4
    path.write_bytes(damaged)
    source = open_source(DataOptions(name="shards", path=str(corpus / "flipped")), 0)
    with pytest.raises(DataError, match=r"train-00001\.bin is damaged: its SHA-256 is"):
        source.verify(0, 1)
    source.verify(0, 2)  # another process has that file
    assert main(["data", "verify", f"path={corpus}/flipped"]) == 2
    assert "train-00001.bin is damaged" in capsys.readouterr().err
    assert main(["data", "verify", f"path={corpus}/shards"]) == 0
    run = ["data=shards", f"data.path={corpus}/flipped", "train.max_steps=1"]
    with pytest.raises(DataError, match=r"train-00001\.bin is damaged"):
        run_tiny(corpus / "run", run)
    path.write_bytes(damaged[:-8])
    with pytest.raises(DataError, match=rf"has {len(damaged) - 8} bytes; .* says {len(damaged)}"):
        both(corpus, path=str(corpus / "flipped"))


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    from distllm.data.token_files import Manifest

    manifest = Manifest(vocab_size=2**16, eos_id=0, tokenizer="", settings={})
    assert manifest.dtype == np.uint16
    manifest.vocab_size += 1
    assert manifest.dtype == np.uint32


def test_mixed_without_being_rewritten(corpus):
    path = str(corpus / "shards")
    mix = [{"path": path, "weight": 3.0, "limit": 40}, {"path": path, "weight": 1.0}]
    from distllm.data.mixture import make_sampler
    from distllm.data.options import MixPart

    parts = [MixPart(**m) for m in mix]
    _, rows = both(corpus, path=None, mix=parts)
    assert rows.parts[0].num_documents == 40
    order = make_sampler(rows, seed=0).indices(0, len(rows))
    share = sum(i < len(rows.parts[0]) for i in order) / len(rows)
    assert abs(share - 0.75) < 0.01
    bad = [MixPart(path=path), MixPart(path=path, columns={})]
    assert len(both(corpus, path=None, mix=bad)[1].shares) == 0


def test_another_tokenizer_is_refused(corpus, tmp_path):
    other = train_tokenizer(["quite other words"], 280)
    source = open_source(DataOptions(name="shards", path=str(corpus / "shards")), 0)
    with pytest.raises(ConfigError, match=r"made with another tokenizer than the run's\. Set"):
        text_rows(source, other, 8, "train")


def test_what_is_no_document_is_refused(corpus, capsys):
    (corpus / "chat.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    assert main(["data", "tokenize", f"path={corpus}/chat.jsonl", f"tokenizer={corpus}/tokenizer",
                 f"out={corpus}/chat"]) == 2  # fmt: skip
    assert "holds dialogues; only documents are tokenised" in capsys.readouterr().err
    assert tokenize(corpus, "bad", "data.on_bad_line=error") == 2
    assert "line 201: text is int 5" in capsys.readouterr().err
    assert main(["data", "tokenize", f"path={corpus}/text.jsonl", f"out={corpus}/none"]) == 2
    assert "needs tokenizer=DIR" in capsys.readouterr().err


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["train/loss"] for r in rows if "train/loss" in r]


def test_training_is_the_same_as_from_texts_and_resumes_exactly(corpus, tmp_path):
    common = [
        "stage=pretrain", "train.seq_len=32", "train.global_batch_size=4", "train.micro_batch_size=4",
        "train.log_every_steps=1", f"tokenizer={corpus}/tokenizer", "arch.vocab_size=300",
    ]  # fmt: skip
    shards = [*common, "data=shards", f"data.path={corpus}/shards"]
    texts = [*common, "data=file", f"data.path={corpus}/text.jsonl", "data.on_bad_line=skip"]
    with pytest.warns(UserWarning, match="1 of 401 records"):
        run_tiny(tmp_path / "texts", [*texts, "train.max_steps=6"])
    run_tiny(tmp_path / "shards", [*shards, "train.max_steps=6"])
    assert losses(tmp_path / "shards") == losses(tmp_path / "texts")
    run_tiny(tmp_path / "parts", [*shards, "train.max_steps=3"])
    run_tiny(tmp_path / "parts", [*shards, "train.max_steps=6"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "shards")
    saved = [(tmp_path / n / "model/model.safetensors").read_bytes() for n in ("parts", "shards")]
    assert saved[0] == saved[1]
