"""Every checkpoint family against transformers: the same numbers, gradients and files, and the same tokens.

A new file in `arch/hf/` is tested here on arrival. That a wrong switch fails is shown in `test_negative_controls.py` and
`test_encoder_decoder_switches.py`.
"""

import pytest
import torch
from safetensors.torch import load_file

from distllm.arch.hf.family import families
from distllm.arch.io import load_model
from distllm.testing.pairs import BF16_ROOM, CASES, GRADIENT_TOLERANCE, TOLERANCE, padding_sides

CAUSAL = [n for n, (model_type, _) in CASES.items() if families()[model_type].arch != "encoder"]


@pytest.mark.parametrize(
    ("name", "side"), [(name, side) for name in CASES for side in padding_sides(name)]
)
def test_logits(pair, name, side):
    this = pair(name)
    assert this.logits_error(side) <= TOLERANCE
    with torch.no_grad():
        _, expected = this.logits(this.inputs(side))
    # T5 divides by sqrt(d) before its tied matrix.
    assert expected.std() > (0.05 if this.two_sequences else 0.2)


@pytest.mark.parametrize("name", CASES)
def test_packed_rows(pair, name):
    """Documents in one row, sources and targets of unlike lengths, give what each gives alone."""
    assert pair(name).packed_error() <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_rounds_no_worse(pair, name):
    ratios = pair(name).bf16_ratios()
    assert max(ratios["max"], ratios["mean"]) <= BF16_ROOM, ratios


@pytest.mark.parametrize("name", CASES)
def test_gradients(pair, name):
    errors = pair(name).gradient_errors()
    assert {n: e for n, e in errors.items() if e > GRADIENT_TOLERANCE} == {}


@pytest.mark.parametrize("name", CASES)
def test_exported_files_are_equal(pair, name, tmp_path):
    """Tensors byte for byte, and settings that make transformers compute the same logits, bit for bit."""
    this = pair(name)
    assert this.export(tmp_path / "m") == []
    tensors = load_file(tmp_path / "m/model.safetensors")
    if this.family.model_type == "t5":
        assert ("lm_head.weight" in tensors) == (name == "t5_v1_1")
    again, _ = load_model(tmp_path / "m")
    given = this.inputs("right")
    with torch.no_grad():
        assert torch.equal(again(**given).logits, this.ours(**given).logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_tokens(pair, name):
    """64 tokens for a batch of 8, padded on the left where the family pads there."""
    got, expected = pair(name).greedy()
    assert got == expected
    assert [len(row) for row in got] == [64] * 8
    assert len({tuple(row) for row in got}) >= 2
