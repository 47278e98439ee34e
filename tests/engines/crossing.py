"""What the ranks of `test_crossing.py` run: one training run handed from engine to engine, and what each step consumed."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import torch

from distllm.config.compose import compose
from distllm.engines.processes import processes
from distllm.testing.stages import TINY, StopAfter, run_tiny
from distllm.train.source import SampleSource


def stretch(folder, settings, stop_after=None):
    """Go on with the run in `folder` under the engine of `settings`, perhaps for a number of steps only."""
    kept = SampleSource.next

    def next_and_note(source, step):
        work, metrics = kept(source, step)
        ids = [i for batch in work[0].micro_batches for i in batch.sample_ids.tolist()]
        rank = source.engine.ranks
        path = Path(folder).parent / f"consumed_{rank.rank}.jsonl"
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "ids": ids, "tp_rank": rank.tp_rank}) + "\n")
        return work, metrics

    stop = None if stop_after is None else StopAfter(stop_after)
    with mock.patch.object(SampleSource, "next", next_and_note):
        return run_tiny(Path(folder), settings, stop).finished


def relay(stretches):
    """Run [folder, settings, stop after] one after the other in one process group; say which of them finished."""
    config = compose([*TINY, *stretches[0][1], "run.dir=unused"])
    with processes(config.engine, torch.device("cpu")):
        return [stretch(*arguments) for arguments in stretches]
