"""The built-in corpus: what is in it, against `pydoc` and `inspect`, and what happens where parts
are missing."""

import importlib
import inspect
import sys
from collections import Counter

import pytest

from distllm.data import stdlib
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def text():
    return stdlib.read_stdlib()


def test_size_and_cleanness(text):
    size = sum(len(t) for _, t in text.documents)
    assert 1_500_000 < size < 4_000_000
    assert len(text.documents) > 400
    for name, document in text.documents:
        document.encode("utf-8")
        assert document.strip() == document != "", name
        assert all(c.isprintable() or c in "\n\t" or ord(c) >= 0x80 for c in document), name
    names = [n for n, _ in text.documents]
    assert names == sorted(set(names))
    assert max(Counter(t for _, t in text.documents).values()) == 1


def test_holds_the_docstrings_that_inspect_sees(text):
    documents = dict(text.documents)
    for module_name in ("textwrap", "json.decoder", "collections", "statistics"):
        module = importlib.import_module(module_name)
        document = documents[module_name]
        assert inspect.getdoc(module).strip() in document
        for name, value in vars(module).items():
            local = getattr(value, "__module__", None) == module_name
            if local and inspect.isfunction(value) and value.__doc__:
                assert inspect.cleandoc(value.__doc__) in document, name
                # Functions that a module only builds at run time have no definition to read.
                if value.__name__ == name and not name.startswith("_"):
                    assert (module_name, name) in text.definitions
    assert "topic assert" in documents
    assert "class JSONDecoder\n" in documents["json.decoder"]
    assert "JSONDecoder.decode(self, s, " in documents["json.decoder"]


def test_leaves_out_tests_and_what_is_not_the_library(text):
    for name, _ in text.documents:
        parts = name.split(".")
        assert not set(parts) & {
            "test",
            "tests",
            "idlelib",
            "turtledemo",
            "lib2to3",
            "pip",
            "numpy",
        }


def test_splits_by_name_whatever_the_seed(text):
    sources = [
        open_source(DataOptions(heldout_fraction=f), s) for f, s in ((0.05, 0), (0.05, 1), (0.3, 0))
    ]
    train, heldout = (
        [{d.name for d in s.documents(x)} for s in sources] for x in ("train", "heldout")
    )
    for kept, held in zip(train, heldout, strict=True):
        assert not kept & held
        assert len(kept | held) == len(text.documents)
    assert heldout[0] == heldout[1] < heldout[2]
    assert 0.02 < len(heldout[0]) / len(text.documents) < 0.08
    assert sources[0].fingerprint() == sources[1].fingerprint() != sources[2].fingerprint()


def test_serves_documents_only():
    with pytest.raises(
        ConfigError, match=r"data=stdlib serves documents \(stage=pretrain\); pairs .*data=skills"
    ):
        open_source(DataOptions(), 0).pairs("train")
    with pytest.raises(ConfigError, match=r"split=test is unknown. Known: train, heldout"):
        open_source(DataOptions(), 0).documents("test")


@pytest.fixture
def fresh():
    """Read anew, and let later tests read anew."""
    stdlib.read_stdlib.cache_clear()
    yield stdlib.read_stdlib
    stdlib.read_stdlib.cache_clear()


def test_missing_parts_are_said(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "gone")})
    with pytest.warns(
        UserWarning, match=r"no standard library sources in .*gone.* \d+ help topics only"
    ):
        known = fresh()
    assert all(name.startswith("topic ") for name, _ in known.documents)
    fresh.cache_clear()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with (
        pytest.warns(UserWarning) as said,
        pytest.raises(DataError, match="carries no documentation"),
    ):
        fresh()
    assert "pydoc_data.topics" in str(said[0].message)


def test_sources_without_topics_and_broken_files(fresh, monkeypatch, tmp_path):
    (tmp_path / "package" / "test").mkdir(parents=True)
    (tmp_path / "good.py").write_text(
        '"""Read me."""\ndef f(a, b):\n    """Add \\x00 \\ud800 them."""\n'
    )
    (tmp_path / "package" / "__init__.py").write_text(
        'class C:\n    """A class."""\ndef _own():\n    """Not offered."""\n'
    )
    (tmp_path / "package" / "test" / "skipped.py").write_text('"""Not me."""')
    (tmp_path / "broken.py").write_text('"""Never closed')
    (tmp_path / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""caf\xe9"""\n')
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.warns(UserWarning, match="topics are left out"):
        known = fresh()
    assert dict(known.documents) == {
        "good": "module good\n\nRead me.\n\nf(a, b)\nAdd   them.",
        "latin": "module latin\n\ncafé",
        "package": "module package\n\nclass C\nA class.\n\n_own()\nNot offered.",
    }
    assert known.definitions == (("good", "f"), ("package", "C"))
