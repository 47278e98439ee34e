"""Every cell of architecture x stage learns its toy; the fastest ones here, the rest with `-m slow`."""

import pytest

from distllm.testing.matrix import CELLS, run_cell

FAST = {"encoder classify", "encoder bandit", "encoder tag"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize(
    "key", [key if key in FAST else pytest.param(key, marks=pytest.mark.slow) for key in CELLS]
)
def test_the_cell_learns(key, folder):
    result = run_cell(key, folder)
    assert result.learned, result


def test_every_architecture_has_every_stage():
    for arch in ("encoder", "decoder", "encoder-decoder", "GLM", "LSTM"):
        columns = {cell.column for cell in CELLS.values() if cell.arch == arch}
        assert columns == {"pretrain", "SFT", "reward", "RL"}
