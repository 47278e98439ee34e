"""A small random model of transformers beside ours that was read from its files, and the distances between them.

The equality contract in `tests/contracts/` asserts on these figures and `parity_table.py` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distllm.arch.hf.family import families
from distllm.arch.io import load_model, save_model
from distllm.generation.tensors import generate
from distllm.testing import parity

TOLERANCE = 1e-5
"""Of the largest logit, in float32."""
GRADIENT_TOLERANCE = 1e-4
"""Of the largest value in the gradient of the same tensor."""
BF16_ROOM = 1.25
"""Our error in bfloat16 may be so many times the reference's own."""

_V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5_v1_1": ("t5", _V1_1),
    "t5_v1_1_tied": ("t5", _V1_1),
    "bart_unscaled": ("bart", {"scale_embedding": False}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name, family in sorted(families().items()) if family.tiny},
    **_VARIANTS,
}
"""Name -> (model_type, settings that differ from the family's small model): each family, and more where it has versions."""

PACKED = (((0, 9), (9, 10), (10, 22)), ((0, 3), (3, 12), (12, 16)))
"""Where the documents of a packed row begin and end, and where their targets do."""

FREE_SETTINGS = {
    "dtype", "transformers_version", "_name_or_path", "architectures", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "forced_eos_token_id",  # of the tokenizer, and there is none
    "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop",  # we have no such dropout
    "summary_first_dropout", "sliding_window", "max_window_layers", "n_inner",
    "tie_word_embeddings",  # transformers 5 writes what it likes for T5; whether lm_head.weight is there decides
}  # fmt: skip
"""Settings that may differ without changing what the model computes."""


def padding_sides(name: str) -> list[str]:
    """Return where rows of a case are padded: BART's and Marian's positions are counted from the row's start."""
    is_counted = CASES[name][0] in ("bart", "marian")
    return ["none", "right"] if is_counted else ["none", "right", "left"]


class Pair:
    """A model of transformers and ours."""

    def __init__(self, name: str, folder: Path) -> None:
        """Build the reference of a case, save it below `folder` and read it."""
        model_type, changes = CASES[name]
        self.family = families()[model_type]
        self.head = next(iter(self.family.architectures))
        self.reference = parity.reference(self.family, self.head, **changes)
        if name == "t5_v1_1":  # transformers 5 ties every fresh T5; files of v1.1 hold two matrices
            own = torch.randn(97, 64, generator=torch.Generator().manual_seed(9)) * 0.2
            self.reference.lm_head.weight = torch.nn.Parameter(own)
        self.folder = parity.save(self.reference, folder / name)
        self.ours, _ = load_model(self.folder)
        self.vocab_size: int = self.ours.options.vocab_size
        self.sides = padding_sides(name)
        self.two_sequences: bool = self.ours.abilities.two_sequences

    def inputs(self, side: str) -> dict[str, Tensor]:
        """Draw token ids and their mask, [3, SEQ]; for two sequences a target, padded elsewhere, too."""
        if not self.two_sequences:
            ids, mask = parity.padded(self.vocab_size, side)
            return {"input_ids": ids, "attention_mask": mask}
        ids, mask = parity.padded(96, side)
        target, target_mask = (x.flip(0)[:, :17] for x in parity.padded(96, "right"))
        return {
            "input_ids": ids, "attention_mask": mask,
            "decoder_input_ids": target, "decoder_attention_mask": target_mask,
        }  # fmt: skip

    def logits(self, given: Mapping[str, Tensor], model: Any = None) -> tuple[Tensor, Tensor]:
        """Return (ours or `model`'s, theirs) at the real tokens, each [tokens, vocab]."""
        model = self.ours if model is None else model
        mask = given["decoder_attention_mask" if self.two_sequences else "attention_mask"]
        extra = {}
        # RoBERTa counts positions itself, from the ids that are no padding.
        if not self.two_sequences and not self.ours.options.position_offset:
            extra["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        real = mask.bool()
        return model(**given).logits[real], self.reference(**given, **extra).logits[real]

    @torch.no_grad()
    def logits_error(self, side: str, model: Any = None) -> float:
        """Return the largest difference of a logit as a share of the largest logit."""
        return parity.relative_error(*self.logits(self.inputs(side), model))

    @torch.no_grad()
    def packed_error(self) -> float:
        """Return the same for three documents in each row, held to what each gives alone."""
        given = self.inputs("none")
        ids, target = given["input_ids"], given.get("decoder_input_ids")
        packed = {"input_ids": ids, "segment_ids": _marks(ids, PACKED[0])}
        if target is not None:
            packed |= {
                "decoder_input_ids": target,
                "decoder_segment_ids": _marks(target, PACKED[1]),
            }
        got, worst = self.ours(**packed).logits, 0.0
        for (a, b), (c, d) in zip(*PACKED, strict=True):
            alone = {"input_ids": ids[:, a:b]}
            if target is None:
                c, d = a, b
            else:
                alone["decoder_input_ids"] = target[:, c:d]
            worst = max(worst, parity.relative_error(got[:, c:d], self.reference(**alone).logits))
        return worst

    def gradient_errors(self) -> dict[str, float]:
        """Return their tensor -> largest difference of its gradient, as a share of the gradient's largest value.

        The loss is linear in the logits with random factors, so that every logit counts. A gradient that is next to
        nothing beside the others (less than a thousandth) is measured against a thousandth of the largest.
        """
        logits, expected = self.logits(self.inputs("right"))
        generator = torch.Generator().manual_seed(2)
        factors = torch.randn(logits.shape, generator=generator) / logits.shape[-1]
        ours = parity.gradients((logits * factors).sum(), self.ours)
        theirs = parity.gradients((expected * factors).sum(), self.reference)
        translated: dict[str, Tensor] = {}
        for rule in self.family.rules(self.ours.options, self.head):
            if all(n in ours for n in rule.ours):
                made = rule.store([ours[n] for n in rule.ours])
                translated |= dict(zip(rule.theirs, made, strict=True))
        theirs = parity.as_on_disk(self.family, theirs)
        if set(translated) != set(theirs):
            raise AssertionError(
                f"gradients of {sorted(set(translated) ^ set(theirs))} on one side"
            )
        largest = max(float(g.abs().max()) for g in theirs.values())
        return {
            name: float((translated[name] - g).abs().max())
            / max(float(g.abs().max()), 1e-3 * largest)
            for name, g in theirs.items()
        }

    @torch.no_grad()
    def bf16_ratios(self, rows: int = 32) -> dict[str, float]:
        """Return how many times the reference's own error in bfloat16 ours is, both held to the reference in float32.

        `mean` is of all logits, `max` of each row's largest error, averaged over the rows, and `single` of the one
        largest error of all: a matter of luck, which goes either way from draw to draw.
        """
        generator = torch.Generator().manual_seed(3)

        def ids(length: int) -> Tensor:
            return torch.randint(4, 96, (rows, length), generator=generator)

        given = {"input_ids": ids(parity.SEQ)}
        if self.two_sequences:
            given["decoder_input_ids"] = ids(17)
        exact = self.reference(**given).logits
        rounded = type(self.reference).from_pretrained(
            self.folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        ours, _ = load_model(self.folder, dtype=torch.bfloat16)
        theirs, mine = (
            (m.eval()(**given).logits.float() - exact).abs().flatten(1) for m in (rounded, ours)
        )
        return {
            "max": float(mine.amax(dim=1).mean() / theirs.amax(dim=1).mean()),
            "mean": float(mine.mean() / theirs.mean()),
            "single": float(mine.max() / theirs.max()),
        }

    def export(self, folder: Path) -> list[str]:
        """Write ours to `folder`, let transformers read it, and return what differs: tensors by byte, settings, logits."""
        save_model(self.ours, None, folder)
        before, after = (load_file(f / "model.safetensors") for f in (self.folder, folder))
        problems = [f"tensor {name} on one side" for name in sorted(before.keys() ^ after.keys())]
        problems += [
            f"tensor {name}" for name in sorted(before.keys() & after.keys())
            if before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name])
        ]  # fmt: skip
        loaded, report = type(self.reference).from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
        )
        problems += [f"missing {n}" for n in report["missing_keys"]]
        problems += [f"unexpected {n}" for n in report["unexpected_keys"]]
        theirs, ours = self.reference.config.to_dict(), loaded.config.to_dict()
        problems += [
            f"{k}: {theirs[k]} became {ours.get(k)}"
            for k in theirs
            if theirs[k] != ours.get(k) and k not in FREE_SETTINGS
        ]
        given = self.inputs("right")
        with torch.no_grad():
            if not torch.equal(loaded.eval()(**given).logits, self.reference(**given).logits):
                problems.append("logits")
        return problems

    @torch.no_grad()
    def greedy(self, num_tokens: int = 64) -> tuple[list[list[int]], list[list[int]]]:
        """Return (ours, theirs): what a batch of 8 goes on with, padded on the left where the family pads there."""
        vocab_size = 96 if self.two_sequences else self.vocab_size
        ids, mask = parity.padded(vocab_size, self.sides[-1], rows=4)
        ids, mask = torch.cat([ids, ids]), torch.cat([mask, mask])
        ids[4:] = torch.where(mask[4:] == 1, ids[:4].flip(1).clamp(min=4), ids[4:])
        settings: dict[str, Any] = {}
        if self.two_sequences:
            settings = {
                "decoder_start_token_id": self.ours.options.decoder_start_id,
                "forced_eos_token_id": None,
                "num_beams": 1,
                "use_cache": False,  # its cache takes a T5 decoder to be as deep as the encoder
            }
        theirs = self.reference.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens,
            do_sample=False, pad_token_id=1, eos_token_id=None, bos_token_id=None, **settings,
        )  # fmt: skip
        ours = generate(self.ours, ids, mask, max_new_tokens=num_tokens, temperature=0.0)
        start = 1 if self.two_sequences else parity.SEQ
        return ours[:, start:].tolist(), theirs[:, start:].tolist()


def _marks(ids: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Number the documents of each row from 1; what is outside them is padding, 0."""
    marks = torch.zeros_like(ids)
    for number, (start, end) in enumerate(spans, start=1):
        marks[:, start:end] = number
    return marks
