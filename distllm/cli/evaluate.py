"""`distllm evaluate`: measures a model on held-out data and prints JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

from distllm.cli.arguments import split

HELP = """
usage: distllm evaluate model=DIR data=DATA [train.num_eval_samples=N] [out=FILE] [plot=FILE] [key=value ...]

Documents give nats per token and bits per byte, dialogues and prompts exact match, and the share of sampled tokens that
are equal whether prompts are answered together or each by itself (train.precision=fp32 or bf16). Pairs give a reward model's accuracy
with its interval, calibration bin by bin, how much length sways it, and whether padding or batch size does.

Examples:
  distllm evaluate model=runs/demo/pretrain/model data=stdlib
  distllm evaluate model=runs/demo/sft/model stage=sft data=skills out=result.json
  distllm evaluate model=runs/demo/reward/model data=skills plot=reliability.svg
"""
OWN = {
    "out": "file to write the JSON to, beside printing it",
    "plot": "reward model: image file (.svg, .png, .pdf) for the reliability plot",
}


def run(arguments: Sequence[str]) -> int:
    """Print the metrics as one JSON object."""
    given = split("evaluate", arguments, OWN)

    from distllm.config.checks import machine_problems
    from distllm.config.compose import compose
    from distllm.config.overrides import raise_all
    from distllm.errors import ConfigError

    config = compose(given.overrides, also_known=OWN)
    if config.model is None:
        raise ConfigError("`distllm evaluate` needs model=DIR, such as model=RUN/model.")
    raise_all(machine_problems(config))

    from distllm.engines.processes import rank
    from distllm.pipeline.evaluate_model import evaluate

    metrics = evaluate(config)
    text = json.dumps(metrics, indent=2)
    if rank() != 0:
        return 0
    print(text)
    if "out" in given.own:
        Path(given.own["out"]).write_text(text + "\n", encoding="utf-8")
    if "plot" in given.own:
        if "reliability" not in metrics:
            raise ConfigError("plot=FILE draws the calibration of a reward model; this is none.")
        from distllm.tracking.reliability import draw_reliability

        draw_reliability(metrics["reliability"], Path(given.own["plot"]), config.model)
    return 0
