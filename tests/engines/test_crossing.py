"""A run handed from engine to engine and from world size to world size goes on as if nothing had happened."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from crossing import stretch

from distllm.errors import ConfigError
from distllm.testing.gloo import run_on
from distllm.testing.stages import SKILLS, run_tiny, tiny_model

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(900)
COMMON = [
    "train.max_steps=12",
    "train.micro_batch_size=2",
    "train.log_every_steps=1",
    "train.save_every_steps=2",
    "schedule=cosine",
    "schedule.warmup_steps=2",
    "optim.lr=1e-3",
    "arch.dropout=0",
]
"""24 samples, 8 a step: three steps an epoch; most stops fall into the middle of one."""

SINGLE, DDP, FSDP = ["engine=single"], ["engine=ddp"], ["engine=fsdp"]
TP = [*FSDP, "engine.mesh.tp_size=2"]
HSDP = [*FSDP, "engine.mesh.dp_replicate=2"]
ACCELERATE = ["engine=accelerate", f"engine.config='{HERE / 'accelerate_cpu.yaml'}'"]
ZERO = {
    stage: [
        "engine=deepspeed",
        f"engine.zero_stage={stage}",
        f"engine.config='{HERE / 'small_parts.json'}'",  # at the usual sizes nothing would be cut
    ]
    for stage in (1, 2, 3)
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return the folder, the settings of each stage, and run each undisturbed on one process."""
    folder = tmp_path_factory.mktemp("crossing")
    model = f"model='{tiny_model(folder)}'"
    judged = ["stage=reward", *SKILLS, model, "train.max_steps=4", "optim.lr=0.01"]
    run_tiny(folder / "judge", judged)
    judge = f"stage.reward_model='{folder / 'judge' / 'model'}'"
    settings = {
        "sft": [*COMMON, "stage=sft", *SKILLS, model],
        "ppo": [*COMMON, "stage=ppo", *SKILLS, model, judge, "stage.rollout_batch_size=16"],
    }
    for name, own in settings.items():
        (folder / name).mkdir()
        assert stretch(folder / name / "whole", [*own, *SINGLE])
    return folder, settings


def relay(num_processes, folder, settings, *legs):
    """Let `legs` (engine's settings, steps) go on with the run in `folder`, all in one launch."""
    stretches = [[str(folder), [*settings, *engine], steps] for engine, steps in legs]
    arguments = {"stretches": stretches}
    found = run_on(num_processes, "crossing:relay", arguments, path=[HERE], timeout_s=800)
    assert all(rank == found[0] for rank in found)
    return found[0]


def steps_of(folder):
    """Return the training steps' lines by step; a step that was logged twice is an error."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in lines if "train/loss" in m]
    assert [m["step"] for m in steps] == list(range(1, 13))
    return steps


def same_curve(whole, parts):
    """Compare losses, norms and learning rates of two runs."""
    for a, b in zip(steps_of(whole), steps_of(parts), strict=True):
        for key in ("train/loss", "train/grad_norm", "train/lr", "value/loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)


def ledger(folder, step=12):
    state = json.loads((folder / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    return state["data_position"]


def assert_one_format(folder):
    """No engine leaves a checkpoint of its own library."""
    files = [p for p in (folder / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".json", ".safetensors"}, files


def consumed(folder):
    """Return step -> the samples that went into it, from what the ranks noted themselves."""
    steps = {}
    for path in folder.parent.glob("consumed_*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["tp_rank"] == 0:
                steps.setdefault(line["step"], []).extend(line["ids"])
    return steps


def check_ledger(whole, parts):
    """Every sample once an epoch, in the same steps as without a stop."""
    assert ledger(parts) == ledger(whole)
    steps = consumed(parts)
    assert {s: sorted(ids) for s, ids in steps.items()} == {
        s: sorted(ids) for s, ids in consumed(whole).items()
    }
    for epoch in range(4):
        seen = Counter(i for step in range(3 * epoch, 3 * epoch + 3) for i in steps[step])
        assert seen == Counter(range(24))


def test_ddp_then_fsdp_then_tensor_parallel_then_single(start):
    folder, settings = start
    run = folder / "sft-relay" / "run"
    run.parent.mkdir()
    finished = relay(2, run, settings["sft"], (DDP, 4), (FSDP, 3), (TP, 1))
    assert finished == [False, False, False]
    assert json.loads((run / "stopped.json").read_text())["step"] == 8
    assert {p.name for p in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    assert stretch(run, [*settings["sft"], *SINGLE])
    assert not (run / "stopped.json").exists()
    same_curve(folder / "sft" / "whole", run)
    check_ledger(folder / "sft" / "whole", run)


EXPORTING = {"ddp": DDP, "fsdp": FSDP, "tp": TP}
OTHERS = {"accelerate": ACCELERATE} | {f"zero {stage}": ZERO[stage] for stage in ZERO}


@pytest.mark.slow
@pytest.mark.parametrize("engines", [EXPORTING, OTHERS], ids=", ".join)
def test_every_engine_exports_the_same_bytes(start, engines):
    """The last checkpoint of one process, exported under others."""
    folder, settings = start
    whole = folder / "sft" / "whole"
    copies = []
    for name in engines:
        copy = folder / f"export-{name}" / "run"
        shutil.copytree(whole, copy)
        shutil.rmtree(copy / "model")
        (copy / "result.json").unlink()
        copies.append(copy)
    stretches = [
        [str(c), [*settings["sft"], *engine], None]
        for c, engine in zip(copies, engines.values(), strict=True)
    ]
    run_on(2, "crossing:relay", {"stretches": stretches}, path=[HERE], timeout_s=800)
    expected = (whole / "model" / "model.safetensors").read_bytes()
    for copy in copies:
        assert (copy / "model" / "model.safetensors").read_bytes() == expected, copy.parent.name


def test_a_world_size_that_does_not_divide_the_batch_is_refused(start, monkeypatch):
    folder, settings = start
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"dp_size \(3\).*among 1, 2 or 4 processes"):
        run_tiny(folder / "refused", [*settings["sft"], *DDP])


@pytest.mark.slow
def test_one_process_then_four_then_two_then_one(start):
    folder, settings = start
    run = folder / "sft-sizes" / "run"
    run.parent.mkdir()
    assert not stretch(run, [*settings["sft"], *SINGLE], 3)
    assert relay(4, run, settings["sft"], (HSDP, 2), (TP, 2)) == [False, False]
    assert relay(2, run, settings["sft"], (DDP, 3)) == [False]
    assert stretch(run, [*settings["sft"], *SINGLE])
    same_curve(folder / "sft" / "whole", run)
    check_ledger(folder / "sft" / "whole", run)


@pytest.mark.slow
def test_zero_3_then_fsdp_on_four_then_single(start):
    pytest.importorskip("deepspeed")
    folder, settings = start
    run = folder / "sft-zero" / "run"
    run.parent.mkdir()
    assert relay(2, run, settings["sft"], (ZERO[3], 5)) == [False]
    assert_one_format(run)
    assert relay(4, run, settings["sft"], (FSDP, 3)) == [False]
    assert stretch(run, [*settings["sft"], *SINGLE])
    same_curve(folder / "sft" / "whole", run)
    check_ledger(folder / "sft" / "whole", run)


@pytest.mark.slow
def test_through_every_stage_of_zero_and_accelerate(start):
    """From what one process saved, and back."""
    pytest.importorskip("deepspeed")
    folder, settings = start
    run = folder / "sft-stages" / "run"
    run.parent.mkdir()
    assert not stretch(run, [*settings["sft"], *SINGLE], 2)
    legs = [(ZERO[1], 2), (ZERO[2], 2), (ZERO[3], 2), (ACCELERATE, 2)]
    assert relay(2, run, settings["sft"], *legs) == [False] * 4
    assert_one_format(run)
    assert stretch(run, [*settings["sft"], *SINGLE])
    same_curve(folder / "sft" / "whole", run)
    check_ledger(folder / "sft" / "whole", run)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["bert_tiny", "t5_tiny"])
def test_encoders_and_encoder_decoders_cross_too(start, arch):
    """Their own objectives, masked language modelling and span corruption: ZeRO-3, then FSDP, then one process."""
    pytest.importorskip("deepspeed")
    folder, _ = start
    text = ["data=file", f"data.path='{folder / 'text.txt'}'", "arch.n_kv_heads=4"]
    settings = [*COMMON, "stage=pretrain", f"arch={arch}", *text]
    run = folder / arch / "relay"
    run.parent.mkdir()
    assert stretch(folder / arch / "whole", [*settings, *SINGLE])
    assert relay(2, run, settings, (ZERO[3], 5)) == [False]
    assert relay(2, run, settings, (FSDP, 4)) == [False]
    assert stretch(run, [*settings, *SINGLE])
    same_curve(folder / arch / "whole", run)
    assert ledger(run) == ledger(folder / arch / "whole")
    assert_one_format(run)


@pytest.mark.slow
def test_rollouts_in_use_go_along(start):
    """PPO with four updates a batch of rollouts: the stops fall between two of them, and between phases."""
    folder, settings = start
    run = folder / "ppo-relay" / "run"
    run.parent.mkdir()
    finished = relay(2, run, settings["ppo"], (DDP, 4), (FSDP, 7), (FSDP, 2))
    assert finished == [False, False, False]
    assert stretch(run, [*settings["ppo"], *SINGLE])
    whole = folder / "ppo" / "whole"
    for a, b in zip(steps_of(whole), steps_of(run), strict=True):
        assert b["value/loss"] == pytest.approx(a["value/loss"], rel=1e-4)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-3)
    assert ledger(run) == ledger(whole)
