"""Small models of every checkpoint family, built by transformers once per module."""

import pytest
import torch

from distllm.arch.hf.family import families
from distllm.arch.io import load_model
from distllm.testing import parity

pytest.importorskip("transformers")


class Pair:
    """A model of transformers and ours, read from the directory it was saved to."""

    def __init__(self, name, folder):
        self.family = families()[name]
        self.head = next(iter(self.family.architectures))
        self.reference = parity.reference(self.family, self.head)
        self.folder = parity.save(self.reference, folder / name)
        self.ours, _ = load_model(self.folder)
        self.vocab_size = self.ours.options.vocab_size

    @torch.no_grad()
    def logits(self, ids, mask, model=None):
        """Return (ours, theirs) at the real tokens, [tokens, vocab]."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        # RoBERTa counts positions itself, from the ids that are no padding.
        given = {} if self.ours.options.position_offset else {"position_ids": positions}
        theirs = self.reference(input_ids=ids, attention_mask=mask, **given).logits
        real = mask.bool()
        return (self.ours if model is None else model)(ids, mask).logits[real], theirs[real]


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Return a function that gives the pair of a family."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def of(name):
        if name not in made:
            made[name] = Pair(name, folder)
        return made[name]

    return of
