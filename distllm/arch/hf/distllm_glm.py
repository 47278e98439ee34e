"""The original GLM, for which transformers has no class (its `Glm` and `Glm4` are causal decoders: `glm.py`, `glm4.py`)."""

from distllm.arch.glm import GLMOptions
from distllm.arch.hf.own import OwnFamily

FAMILY = OwnFamily("glm", GLMOptions)
