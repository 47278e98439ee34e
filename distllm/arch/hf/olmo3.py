"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotary wavelengths are never stretched."""

from typing import Any

from distllm.arch.hf.causal import SETTINGS, classes
from distllm.arch.hf.family import expand_layer_types, shorten_layer_types
from distllm.arch.hf.olmo2 import Olmo2
from distllm.arch.hf.rope import read_rope_by_type, write_rope_by_type


class Olmo3(Olmo2):
    """OLMo 3 in all sizes."""

    model_type = "olmo3"
    architectures = classes("Olmo3")
    tiny = {
        **Olmo2.tiny,
        "sliding_window": 7,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 40,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    }
    settings = {**SETTINGS, "sliding_window": "window"}
    defaults = {**Olmo2.defaults, "sliding_window": 4096}

    def read(self, config: Any) -> dict[str, Any]:
        """Return what OLMo 2 has, types of layers, and rotary settings of the two."""
        usual = ["sliding_attention"] * 3 + ["full_attention"]
        types = config.get("layer_types") or [
            usual[i % 4] for i in range(config["num_hidden_layers"])
        ]
        rope = read_rope_by_type(config, 5e5, 5e5, ("rope_theta", "rope_theta"))
        flat = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling")}
        return super().read(flat) | rope | {"layer_types": shorten_layer_types(types)}

    def write(self, options: Any) -> dict[str, Any]:
        """Return what OLMo 2 has, types of layers, and rotary settings of the two."""
        config = super().write(options) | write_rope_by_type(options)
        del config["rope_theta"]
        return config | {"layer_types": expand_layer_types(options)}


FAMILY = Olmo3()
