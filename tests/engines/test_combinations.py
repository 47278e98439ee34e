"""Recomputation, compilation and gradient accumulation together, under every engine: the steps of one plain process."""

from pathlib import Path

import pytest
import torch
from on_combinations import run
from on_zero import Run

from distllm.testing.gloo import run_on

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TESTS = Path(__file__).resolve().parents[1]
PATHS = [TESTS / "engines", TESTS / "train", TESTS]
# At the usual sizes no weight of this model would ever be cut.
PARTS = {"config": str(TESTS / "engines" / "small_parts.json")}
LAYOUTS = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "hsdp": ("fsdp", {"mesh": {"dp_replicate": 2}}),
    "tp": ("fsdp", {"mesh": {"tp_size": 2}}),
    "zero 0": ("deepspeed", {"zero_stage": 0}),
    "zero 1": ("deepspeed", {"zero_stage": 1, **PARTS}),
    "zero 2": ("deepspeed", {"zero_stage": 2, **PARTS}),
    "zero 3": ("deepspeed", {"zero_stage": 3, **PARTS}),
    "zero 3, offload": (
        "deepspeed",
        {"zero_stage": 3, "offload_optimizer": True, "offload_param": True, **PARTS},
    ),
    "accelerate": ("accelerate", {}),
}
RECOMPUTED = [(layout, {"activation_checkpointing": kind}) for layout in LAYOUTS for kind in ("full", "selective")]  # fmt: skip
COMPILED = [(layout, {"compile": True}) for layout in LAYOUTS]
BOTH = [
    (layout, {"compile": True, "activation_checkpointing": kind})
    for layout, kind in (("fsdp", "selective"), ("fsdp", "full"), ("tp", "full"), ("zero 3", "full"), ("accelerate", "selective"))
]  # fmt: skip


def shown(cell):
    return f"{cell[0]}, {' '.join(map(str, cell[1].values()))}" if isinstance(cell, tuple) else None


@pytest.fixture(scope="module")
def single():
    """Return what one process finds, without any of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS / "train")
        return run([("single", {})])[0]


def launch(cells):
    arguments = {"cells": [(LAYOUTS[name][0], LAYOUTS[name][1] | more) for name, more in cells]}
    found = run_on(2, "on_combinations:run", arguments, path=PATHS, timeout_s=1700)[0]
    return {shown(cell): steps for cell, steps in zip(cells, found, strict=True)}


@pytest.fixture(scope="module")
def recomputed():
    return launch(RECOMPUTED)


@pytest.fixture(scope="module")
def compiled():
    return launch(COMPILED + BOTH)


def check_equal(found, single):
    for quantity in ("losses", "norms"):
        assert found[quantity] == pytest.approx(single[quantity], rel=1e-5), quantity
    assert found["weights"].keys() == single["weights"].keys()
    for name, weight in single["weights"].items():
        difference = torch.tensor(found["weights"][name]) - torch.tensor(weight)
        assert difference.abs().max() < 1e-5, name


@pytest.mark.parametrize("cell", RECOMPUTED, ids=shown)
def test_recomputed(single, recomputed, cell):
    check_equal(recomputed[shown(cell)], single)


@pytest.mark.parametrize("cell", [*COMPILED, *BOTH], ids=shown)
def test_compiled(single, compiled, cell):
    found = compiled[shown(cell)]
    assert found["graphs"] > 0, "nothing was compiled"
    check_equal(found, single)


def test_a_micro_batch_that_is_left_out_would_be_noticed(single):
    """The steps accumulate: two uneven micro-batches each."""
    honest = Run.steps

    def one_less(made):
        del made.batches[-1]
        return honest(made)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS / "train")
        patch.setattr(Run, "steps", one_less)
        found = run([("single", {})])[0]
    with pytest.raises(AssertionError):
        check_equal(found, single)
