"""Settings of one run: where it lives, how long it trains, how often it looks up."""

from dataclasses import dataclass

from distllm.types import free


@dataclass(kw_only=True, slots=True)
class RunOptions:
    """Where a run lives and what makes it repeatable."""

    dir: str = free("")
    """Directory of the run. Empty: `runs/<stage>-<date>-<time>` under the working directory."""
    seed: int = 0
    """Seed of initial weights, data order, dropout and sampling. Equal seeds give equal runs."""


@dataclass(kw_only=True, slots=True)
class TrainOptions:
    """Length, batch sizes and cadences of the training loop."""

    max_steps: int = free(100)
    """Optimizer steps in all, a resumed part included."""
    global_batch_size: int = 32
    """Sequences (pretrain, SFT), pairs (reward) or responses (RL) per optimizer step, over all processes."""
    micro_batch_size: int = free(32)
    """Sequences per forward and backward on one process. Smaller needs less memory; results stay equal."""
    seq_len: int = 256
    """Longest sequence in tokens: packed rows have exactly this length, dialogues at most."""
    precision: str = "auto"
    """`auto` (bf16 where the hardware has it natively, else fp32), `fp32` or `bf16`. Master weights are fp32."""
    shuffle: bool = True
    """Visit samples in a new random order each epoch."""
    log_every_steps: int = free(10)
    """Steps between lines of metrics.jsonl."""
    eval_every_steps: int = free(0)
    """Steps between evaluations on held-out data; 0 evaluates only at the end."""
    num_eval_samples: int = free(256)
    """Held-out samples an evaluation looks at; larger is slower and less noisy."""
    save_every_steps: int = free(100)
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = free(2)
    """Checkpoints to keep; older ones are deleted after a newer one is complete."""
    async_save: bool = free(False)
    """Write checkpoints in the background: a step waits for the copy to host memory only, which must have room for it."""
    max_skipped_steps: int = free(0)
    """Steps with a non-finite loss or gradient that may be skipped before the run stops; 0 stops at the first."""
    max_rollbacks: int = free(0)
    """How often, instead of stopping for that reason, the run may return to its last checkpoint and pass over the data
    that came since. The samples left out are noted in later checkpoints (`data_position`)."""
    checkpoint_fallback: bool = free(True)
    """Go on from the checkpoint before when the newest one is damaged; false stops, and names the damage."""
    allow_other_data: bool = free(False)
    """Go on from a checkpoint although data or tokenizer have changed since it was written; false stops, and names both."""
