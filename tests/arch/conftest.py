"""Small models and batches for the architecture tests."""

import pytest
import torch

from distllm.arch.decoder import Decoder, DecoderOptions

VOCAB = 61


@pytest.fixture
def options():
    return DecoderOptions(
        vocab_size=VOCAB,
        d_model=32,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        d_ff=48,
        max_seq_len=64,
        init_std=0.2,
    )


@pytest.fixture
def build(options):
    """Return a function that builds the small model with other options or another head."""

    def make(head="lm", dtype=torch.float32, **changes):
        for name, value in changes.items():
            setattr(options, name, value)
        model = Decoder(options, head, seed=1).eval()
        with torch.no_grad():  # gains other than 1, so that a forgotten gain shows
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.uniform_(0.5, 1.5, generator=generator)
        return model.to(dtype)

    return make


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
