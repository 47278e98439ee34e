"""Small random models of transformers, made so that a wrong switch shows, and how far ours is from them.

The equality contract in `tests/contracts/` and the parity table are measured with these.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distllm.arch.hf.family import Family

SEQ = 24


def reference(family: Family, head: str = "lm", seed: int = 0, **changes: Any) -> Any:
    """Build a small model of `family` in transformers, in float32, with no parameter left at its usual start.

    Args:
        family: gives the class and the settings.
        head: which class of the family.
        seed: of all values.
        changes: settings other than `family.tiny`'s.
    """
    import transformers

    settings = copy.deepcopy({**family.tiny, **changes})
    config = transformers.AutoConfig.for_model(family.model_type, **settings)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, family.architectures[head])(config)
    perturb(model, seed)
    return model.eval()


@torch.no_grad()
def perturb(model: Any, seed: int) -> None:
    """Draw every parameter anew: gains around 1, matrices large enough that logits reach far.

    Embeddings are small, so that the epsilon of the first norm counts; less so where they are the output matrix too.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    output = model.get_output_embeddings()
    tied = output is not None and id(output.weight) in embeddings
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # computed, not learned: Marian's positions
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(noise * (0.1 if tied else 0.05))
        elif parameter.ndim > 1:
            # T5 scales no scores: its queries are small instead, or every softmax would be a hard choice.
            size = 0.4 if name.endswith("Attention.q.weight") else 1.3
            parameter.copy_(noise * size * parameter.shape[-1] ** -0.5)
        else:
            usual = parameter if "norm" in name.lower() or "ln_" in name else 0.0
            parameter.copy_(usual + 0.3 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("final_logits_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))


def save(model: Any, folder: Path) -> Path:
    """Let transformers write the model."""
    model.save_pretrained(folder)
    return folder


def padded(vocab_size: int, side: str, rows: int = 3, pad_id: int = 1) -> tuple[Tensor, Tensor]:
    """Return (input_ids, attention_mask), [rows, SEQ]: no padding, or growing amounts of it on one side."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, vocab_size, (rows, SEQ), generator=generator)
    mask = torch.ones(rows, SEQ, dtype=torch.long)
    for row in range(rows):
        missing = row * 5
        if side == "right" and missing:
            mask[row, -missing:] = 0
        elif side == "left":
            mask[row, :missing] = 0
    return ids.masked_fill(mask == 0, pad_id), mask


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())


def as_on_disk(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write tensors of a transformers model the way it saves them, where that differs from how it holds them."""
    found = dict(tensors)
    if family.model_type == "qwen3_moe":
        for name in [n for n in found if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            stem, _, which = name.rpartition(".")
            for expert, matrix in enumerate(found.pop(name)):
                parts = {"down_proj": matrix}
                if which == "gate_up_proj":
                    parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
                found |= {f"{stem}.{expert}.{x}.weight": m for x, m in parts.items()}
    return found


def gradients(loss: Tensor, model: Any) -> Mapping[str, Tensor]:
    """Return parameter name -> gradient of `loss`, where there is one."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True) if g is not None}
