"""No data path touches the network: in a fresh process, sockets raise before any import."""

import subprocess
import sys

from distllm.testing.gloo import patient

CODE = """
import os, socket, sys
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"):
    os.environ.pop(name, None)

def refuse(*args, **kwargs):
    raise SystemExit(f"network touched: {args}")

class Socket(socket.socket):
    __init__ = refuse

socket.socket = Socket
for name in ("create_connection", "getaddrinfo", "gethostbyname", "socketpair"):
    setattr(socket, name, refuse)

import pathlib
import pyarrow, pyarrow.parquet
from distllm.data.datasets import ChatDataset, PairDataset, PromptDataset, text_rows
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

folder = pathlib.Path(sys.argv[1])
texts = ["one two three", "four five six"]
save_tokenizer(train_tokenizer(texts, 300), folder / "tokenizer")
tok = load_tokenizer(folder / "tokenizer")
skills = open_source(DataOptions(name="skills", num_train=40, num_prompts=40, num_heldout=20), 0)
ChatDataset(skills.dialogues("train"), tok, 300)
PairDataset(skills.pairs("heldout"), tok, 300)
PromptDataset(skills.prompts("train"), tok, 300)
(folder / "a.jsonl").write_text('{"text": "one"}\\n{"text": "two"}\\n')
pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "b.parquet")
for file in ("a.jsonl", "b.parquet"):
    text_rows(open_source(DataOptions(name="file", path=str(folder / file)), 0), tok, 8, "train")
open_source(DataOptions(), 0).documents("train")
try:
    socket.create_connection(("example.org", 80))
except SystemExit:
    print("done")
"""


def test_data_loading_opens_no_socket(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=patient(120),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip() == "done"
