"""GLM-4-0414: GLM-4 with norms on both sides of every part."""

from distllm.arch.hf.causal import classes
from distllm.arch.hf.glm import Glm
from distllm.arch.options import Placement


class Glm4(Glm):
    """GLM-4-0414, 9B and 32B."""

    model_type = "glm4"
    architectures = classes("Glm4")
    fixed = {**Glm.fixed, "norm_placement": Placement.sandwich}
    norm_names = {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_self_attn_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward_out_norm": "post_mlp_layernorm",
    }


FAMILY = Glm4()
