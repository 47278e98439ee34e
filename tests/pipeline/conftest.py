"""One toy parent model for all tests of whole stages."""

import pytest

from distllm.testing.stages import tiny_model


@pytest.fixture(scope="session")
def parent(tmp_path_factory):
    """Return the directory of a toy model with its tokenizer."""
    return tiny_model(tmp_path_factory.mktemp("parent"))
