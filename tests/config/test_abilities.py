"""Stages that an architecture cannot be trained in are refused before anything starts, with what to set instead."""

import re
from dataclasses import fields

import pytest

from distllm import registry
from distllm.config import checks
from distllm.config.compose import compose
from distllm.errors import ConfigError
from distllm.objectives.options import PRETRAINING, READ_BY, PretrainOptions


@pytest.mark.parametrize(
    "settings, words",
    [
        (["arch=bert_tiny", "stage.objective=clm"], "stage.objective=clm is nothing that arch=encoder can learn. Set stage.objective to mlm"),
        (["arch=llama_tiny", "stage.objective=span"], "arch=decoder can learn. Set stage.objective to clm or prefix"),
        (["arch=t5_tiny", "stage.objective=mlm"], "to span or ul2 or prefix"),
        (["arch=glm_tiny", "stage.objective=clm"], "to blank or prefix"),
        (["arch=bert_tiny", "stage.sampled_words=9"], "stage.sampled_words=9 is for clm, and stage.objective=mlm does"),
        (["arch=lstm_tiny", "stage.sampled_words=9", "stage.z_loss=1e-4"], "Set stage.sampled_words=0 or stage.z_loss=0"),
        (["arch=lstm_tiny", "engine.compile=true"], "torch's own LSTM. Set engine.compile=false"),
        (["arch=lstm_tiny", "engine.activation_checkpointing=selective"], "Set engine.activation_checkpointing=full or none"),
        (["arch=bert_tiny", "stage=sft", "data=skills"], "stage=sft: arch=encoder does not write text"),
        (["arch=bert_tiny", "stage=reward", "data=skills", "stage.head=likelihood"], "Set stage.head=last"),
        (["arch=t5_tiny", "stage=tag", "data=file", "data.path=x"], "stage=tag labels tokens of the input"),
        (["arch=bert_tiny", "stage=grpo", "data=skills"], "stage=grpo learns from labelled"),
        (["arch=llama_tiny", "stage.mask_whole_words=true"], "stage.mask_whole_words=True is for mlm, and stage.objective=clm does"),
        (["arch=llama_tiny", "stage.mask_rate=0.3"], "stage.mask_rate=0.3 is for mlm and span and blank"),
        (["arch=bert_tiny", "stage.fim_rate=0.5"], "stage.fim_rate=0.5 is for clm"),
        (["arch=bert_tiny", "stage.baselines=true"], "stage.baselines=True is for clm"),
        (["arch=t5_tiny", "stage.objective=ul2", "stage.mean_span_length=8"], "is for span and blank, and stage.objective=ul2"),
        (["arch=bert_tiny", "stage.mask_token_share=0.9", "stage.random_token_share=0.2"], "= 1.1, and both are shares of the hidden tokens: at most 1 together. Set stage.random_token_share=0.1 or less"),
        (["arch=glm_tiny", "stage.sentence_share=0.7", "stage.document_share=0.7"], "= 1.4, and both are shares of the texts"),
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


def test_each_objective_reads_what_the_table_says():
    names = {f.name for f in fields(PretrainOptions)}
    for objective in PRETRAINING:
        text = registry.get("objective", objective).__doc__ or ""
        said = (
            set(re.findall(r"\w+", text.split("Reads", 1)[1].split(".")[0]))
            if "Reads" in text
            else set()
        )
        listed = {key for key, readers in READ_BY.items() if objective in readers}
        if (
            objective != "clm"
        ):  # its loss is that of every causal stage: the data and the baselines read the rest
            assert listed == (said & names) - {"z_loss"}, objective
    assert READ_BY.keys() <= names
