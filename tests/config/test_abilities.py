"""Stages that an architecture cannot be trained in are refused before anything starts, with what to set instead."""

import pytest

from distllm.config import checks
from distllm.config.compose import compose
from distllm.errors import ConfigError


@pytest.mark.parametrize(
    "settings, words",
    [
        (["arch=bert_tiny", "stage.objective=clm"], "stage.objective=clm is nothing that arch=encoder can learn. Set stage.objective to mlm"),
        (["arch=llama_tiny", "stage.objective=span"], "arch=decoder can learn. Set stage.objective to clm or prefix"),
        (["arch=t5_tiny", "stage.objective=mlm"], "to span or ul2 or prefix"),
        (["arch=glm_tiny", "stage.objective=clm"], "to blank or prefix"),
        (["arch=bert_tiny", "stage=sft", "data=skills"], "stage=sft: arch=encoder does not write text"),
        (["arch=bert_tiny", "stage=reward", "data=skills", "stage.head=likelihood"], "Set stage.head=last"),
        (["arch=t5_tiny", "stage=tag", "data=file", "data.path=x"], "stage=tag labels tokens of the input"),
        (["arch=bert_tiny", "stage=grpo", "data=skills"], "stage=grpo learns from labelled"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused(settings, words):
    with pytest.raises(ConfigError) as caught:
        checks.check_training(compose([*settings, "train.seq_len=64", "train.precision=fp32"]))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["arch=bert_tiny"],
        ["arch=t5_tiny", "stage.objective=ul2"],
        ["arch=glm_tiny", "stage.objective=prefix"],
        ["arch=lstm_tiny"],
        ["arch=t5_tiny", "stage=grpo", "data=skills"],
        ["arch=bert_tiny", "stage=classify", "data=file", "data.path=x"],
    ],
)
def test_what_can_be_learned_passes(settings):
    checks.check_training(compose([*settings, "train.seq_len=64", "train.precision=fp32"]))
