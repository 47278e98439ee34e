"""Numbers that are not finite on one rank, and a rank that cannot read its data."""

import signal

import pytest
import torch
from fault_runs import (
    NUM_STEPS,
    change_state,
    check_equal,
    check_tidy,
    logged_steps,
    saved_steps,
    state_of,
    stopped_at,
)

from distllm.data.sampler import Sampler
from distllm.testing.stages import SKILLS, TINY, weights_hash
from distllm.train.checkpoint import Loaded
from distllm.train.ledger import Ledger
from distllm.train.manifest import verify

pytestmark = pytest.mark.timeout(900)


def tensors_at(run_dir, step):
    """Load the model and its moments as they were after a step."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    found = Loaded(path, verify(path)).tensors("model")
    return {name: found[name] for name in found}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_f23_what_is_not_finite_on_one_rank_is_skipped_by_all(nursery, settings, tmp_path):
    """A loss on rank 1, one element of a gradient on rank 0; every step is saved, so that the weights can be compared."""
    run_dir = tmp_path / "run"
    faults = [
        {"rank": 1, "at": "loss", "step": 3, "do": "nan"},
        {"rank": 0, "at": "gradient", "step": 5, "do": "inf"},
        {"rank": 1, "at": "loss", "step": 6, "do": "inf"},
    ]
    more = ["train.save_every_steps=1", "train.keep_last=20", "train.max_skipped_steps=3"]
    with nursery.start(run_dir, *settings, *more, faults=faults) as job:
        assert job.end() == [0, 0], job.text()
    assert saved_steps(run_dir) == list(range(1, NUM_STEPS + 1))
    steps = {step: tensors_at(run_dir, step) for step in range(1, 9)}
    assert all(torch.isfinite(t).all() for kept in steps.values() for t in kept.values())
    unchanged = [s for s in range(2, 9) if same_bits(steps[s - 1], steps[s])]
    assert unchanged == [3, 5, 6]


def test_f23_too_many_stop_all_ranks_and_name_the_samples(nursery, settings, tmp_path):
    run_dir = tmp_path / "run"
    faults = [{"rank": 1, "at": "loss", "step": step, "do": "nan"} for step in (5, 6)]
    with nursery.start(run_dir, *settings, "train.max_skipped_steps=1", faults=faults) as job:
        assert job.end() == [2, 2], job.text()
    told = job.ranks[0].text
    assert "Step 6 of the model: non-finite loss" in told and "max_skipped_steps=1" in told
    assert saved_steps(run_dir) == [2, 4]
    check_tidy(run_dir)


def test_f23_a_rollback_passes_over_the_data_since_the_last_checkpoint(
    nursery, settings, oracle, tmp_path
):
    """Back from step 8 to 6; the next time the run stops. It ends as one that was told at step 6 to leave these out."""
    run_dir, other = tmp_path / "run", stopped_at(oracle, tmp_path / "other", 6)
    faults = [{"rank": 1, "at": "loss", "step": step, "do": "nan"} for step in (8, 11)]
    with nursery.start(run_dir, *settings, "train.max_rollbacks=1", faults=faults) as job:
        assert job.end() == [2, 2], job.text()
        told = job.ranks[0].text
    assert "Step 8 was not finite once too often: back to step 6" in told, told
    assert "Step 11 of the model: non-finite loss" in told, told
    with nursery.start(run_dir, *settings, "train.max_rollbacks=1") as job:
        assert job.end() == [0, 0], job.text()

    ledger, sampler = Ledger(), Sampler(24, 0)
    for count in [8] * 6 + [16]:
        ledger.take(sampler, count)

    def leave_out(state):
        state["num_rollbacks"] = 1
        state["data_position"] = state["source"] = ledger.state() | {"passed_over": [[48, 64]]}

    change_state(other, 6, leave_out)
    with nursery.start(other, *settings) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(run_dir, other)
    assert logged_steps(run_dir) == list(range(1, NUM_STEPS + 1))
    position = state_of(run_dir, NUM_STEPS)["data_position"]
    assert (position["position"], position["passed_over"]) == (8 * (NUM_STEPS + 2), [[48, 64]])
    assert weights_hash(run_dir) != weights_hash(oracle)


@pytest.mark.slow
def test_f23_a_rollback_in_rl_samples_anew(nursery, tmp_path):
    """Two updates are made from each rollouts; the second of the second fails, and its rollouts are dropped."""
    run_dir = tmp_path / "run"
    # All rewards of random weights are 0: the KL penalty leaves something to learn from.
    rl = ["stage=grpo", "stage.num_samples=4", "stage.rollout_batch_size=16", "stage.kl_coef=0.1"]
    grpo = [*TINY, *SKILLS, *rl]
    model = f"model='{nursery.folder / 'parent/model'}'"
    every = ["train.max_steps=6", "train.save_every_steps=1", "train.log_every_steps=1"]
    fault = {"rank": 1, "at": "loss", "step": 4, "do": "nan"}
    more = ["engine=fsdp", "train.micro_batch_size=4", "train.max_rollbacks=1", "train.keep_last=9"]
    with nursery.start(run_dir, *grpo, model, *every, *more, faults=[fault]) as job:
        assert job.end() == [0, 0], job.text()
        assert "Step 4 was not finite once too often: back to step 3" in job.ranks[0].text
    assert logged_steps(run_dir) == list(range(1, 7))
    # Steps 1 and 2, step 3, steps 4 and 5, step 6: four prompts each.
    sources = [state_of(run_dir, step)["source"] for step in range(1, 7)]
    assert [s["num_rollouts"] for s in sources] == [1, 1, 2, 3, 3, 4]
    assert [s["ledger"]["position"] for s in sources] == [4, 4, 8, 12, 12, 16]
    check_tidy(run_dir)


@pytest.mark.parametrize("rank", [0, 1])
def test_f23_weights_that_are_not_finite_are_never_saved(nursery, settings, tmp_path, rank):
    run_dir = tmp_path / "run"
    fault = {"rank": rank, "at": "weights", "step": 6, "do": "nan"}
    with nursery.start(run_dir, *settings, faults=[fault]) as job:
        assert job.end() == [2, 2], job.text()
    told = "".join(r.text for r in job.ranks)
    assert "is not finite" in told and "step_00000006" in told, told
    assert saved_steps(run_dir) == [2, 4]
    check_tidy(run_dir)


def test_f10_a_reader_that_fails_on_one_rank_ends_all(nursery, settings, tmp_path):
    run_dir = tmp_path / "run"
    fault = {"rank": 1, "at": "read", "step": 4, "do": "raise", "text": "the shard went away"}
    with nursery.start(run_dir, *settings, faults=[fault]) as job:
        assert job.end() == [1, 1], job.text()
    *_, error, sample = job.ranks[1].text.splitlines()
    assert "the shard went away" in error, job.text()
    ledger, sampler = Ledger(), Sampler(24, 0)
    ids = [ledger.take(sampler, 8) for _ in range(4)][-1]
    assert (
        sample == f"That was sample {ids[1]} of the training data."
    )  # the first of rank 1 in step 4
    assert saved_steps(run_dir) == [2]
    assert logged_steps(run_dir) == [1, 2, 3]


@pytest.mark.slow
def test_f10_a_reader_that_is_killed_or_blocks(nursery, settings, oracle, tmp_path):
    run_dir = tmp_path / "run"
    killed = {"rank": 0, "at": "read", "step": 4, "do": "kill"}
    with nursery.start(run_dir, *settings, faults=[killed]) as job:
        assert job.end() == [-signal.SIGKILL, 1], job.text()
    blocked = {"rank": 1, "at": "read", "step": 6, "do": "sleep", "seconds": 3600}
    with nursery.start(run_dir, *settings, "engine.timeout_s=8", faults=[blocked]) as job:
        job.wait_for(lambda: job.ranks[0].poll() is not None)
        assert job.ranks[0].poll() == 1 and "(limit 8 s)" in job.ranks[0].text, job.text()
    with nursery.start(run_dir, *settings) as job:
        assert job.end() == [0, 0], job.text()
    check_equal(run_dir, oracle)
