"""A classifier learns from a model: a pretrained one, or one that has labels already."""

import json

from distllm.testing.stages import run_tiny

ENCODER = ["arch=bert_tiny", "arch.d_model=32", "arch.n_layers=1", "arch.n_heads=2", "arch.d_ff=64"]


def settings(path):
    return [
        "stage=classify",
        *ENCODER,
        "arch.vocab_size=300",
        "data=file",
        f"data.path={path}",
        "train.max_steps=2",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
    ]


def test_labels_keep_their_numbers(tmp_path):
    rows = [{"text": f"number {i}", "label": "odd" if i % 2 else "even"} for i in range(40)]
    path, turned = tmp_path / "rows.jsonl", tmp_path / "turned.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    turned.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    first = run_tiny(tmp_path / "first", settings(path))
    model = tmp_path / "first" / "model"
    again = run_tiny(tmp_path / "again", [*settings(turned), f"model='{model}'"])
    assert first is not None and again is not None
    names = [json.loads((tmp_path / r / "model/config.json").read_text())["id2label"] for r in ("first", "again")]  # fmt: skip
    assert names[0] == names[1] == {"0": "even", "1": "odd"}
