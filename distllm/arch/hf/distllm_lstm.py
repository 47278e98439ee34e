"""LSTM language models, for which transformers has no class."""

from distllm.arch.hf.own import OwnFamily
from distllm.arch.lstm import LSTMOptions

FAMILY = OwnFamily("lstm", LSTMOptions)
