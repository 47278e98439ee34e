"""Options of the trackers. Which metrics exist is decided by whoever logs them, not here."""

from dataclasses import dataclass

from distllm.types import free


@dataclass(kw_only=True, slots=True)
class TrackingOptions:
    """Where metrics go beside `metrics.jsonl` and `samples.jsonl`, which are always written."""

    name: str = free("jsonl")
    """Tracker: `jsonl` writes the two files only; `wandb` and `tensorboard` write them and report there too."""
    project: str = free("distllm")
    """wandb project that the run is filed under."""
    run_name: str | None = free(None)
    """Name shown for the run; None takes the name of the run directory."""
    samples_per_step: int = free(8)
    """RL: responses of each batch that are written to `samples.jsonl`, spread over it; 0 writes none, a number as large
    as the batch writes all."""
