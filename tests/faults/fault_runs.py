"""The toy run of the fault tests, and how two of them are compared."""

import hashlib
import json
import shutil

from distllm.testing.stages import TINY, timeless_metrics, weights_hash
from distllm.train.manifest import encode, sealed, verify

NUM_STEPS = 12
SETTINGS = [
    *TINY,
    "stage=sft",
    "data=file",
    "engine=fsdp",
    "arch.dropout=0.1",
    f"train.max_steps={NUM_STEPS}",
    "train.micro_batch_size=2",
    "train.save_every_steps=2",
    "train.log_every_steps=1",
]
"""Two ranks, 24 samples, 8 a step; dropout, so that the random generators count too."""


def write_dialogues(folder):
    """Write 24 dialogues and 8 to evaluate on; return the settings. Made in a moment, unlike the built-in exercises."""
    for name, numbers in (("train", range(24)), ("heldout", range(24, 32))):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in numbers:
                words = ("add", "print", "list", "call", "true")
                answer = " ".join(words[(i + j) % 5] for j in range(i % 7 + 2))
                turns = [("user", f"Say {i}: {answer}"), ("assistant", answer)]
                record = {"messages": [{"role": r, "content": c} for r, c in turns]}
                file.write(json.dumps(record) + "\n")
    return [f"data.path='{folder}/train.jsonl'", f"data.heldout_path='{folder}/heldout.jsonl'"]


def check_equal(run_dir, oracle):
    """Both runs ended with the same bytes of weights, and logged the same numbers, each once."""
    assert weights_hash(run_dir) == weights_hash(oracle)
    assert timeless_metrics(run_dir) == timeless_metrics(oracle)
    ledgers = [state_of(r, NUM_STEPS)["data_position"] for r in (run_dir, oracle)]
    assert ledgers[0] == ledgers[1]
    check_tidy(run_dir)


def check_tidy(run_dir):
    """Nothing half made lies among the checkpoints, and all of them are whole."""
    for path in (run_dir / "checkpoints").iterdir():
        assert path.name.startswith("step_"), path.name
        verify(path)


def saved_steps(run_dir):
    """List the steps that have a checkpoint, whole or not."""
    return sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_*"))


def state_of(run_dir, step):
    """Read a checkpoint's JSON."""
    path = run_dir / "checkpoints" / f"step_{step:08d}" / "state.json"
    return json.loads(path.read_text())


def change_state(run_dir, step, change):
    """Let `change` edit a checkpoint's JSON, and seal it again as if it had been written so."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    state = state_of(run_dir, step)
    change(state)
    text = encode(state)
    (path / "state.json").write_bytes(text)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["data_position"] = state["data_position"]
    digest = hashlib.sha256(text).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": digest}
    (path / "manifest.json").write_bytes(sealed(manifest))
    verify(path)


def logged_steps(run_dir):
    """List the training steps of metrics.jsonl."""
    lines = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [m["step"] for m in lines if "train/loss" in m]


def stopped_at(oracle, run_dir, *steps):
    """Copy the oracle into `run_dir` as if it had been killed after the last of `steps`, with checkpoints of all of them."""
    run_dir.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl"):
        shutil.copy(oracle / name, run_dir / name)
    for step in steps:
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(oracle / name, run_dir / name)
    return run_dir
