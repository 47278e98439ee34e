"""Small models of every checkpoint family, built by transformers once per module."""

import pytest

from distllm.testing.pairs import Pair

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Return a function that gives the pair of a case."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def of(name):
        if name not in made:
            made[name] = Pair(name, folder)
        return made[name]

    return of
