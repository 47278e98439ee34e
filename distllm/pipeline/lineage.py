"""Where a model comes from: the data and the parent models by hash, the seed, the versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distllm.config.schema import Config
from distllm.data.tokenizer import tokenizer_fingerprint
from distllm.pipeline.build import Builder
from distllm.train.files import hash_file

PACKAGES = ("distllm", "torch", "transformers", "tokenizers", "hydra-core")


def describe_origin(builder: Builder) -> dict[str, str]:
    """Return the hashes that a checkpoint keeps: of data, tokenizer and code."""
    return {
        "data": builder.data.fingerprint(),
        "tokenizer": tokenizer_fingerprint(builder.tokenizer),
        "code": code_hash(),
    }


def code_hash() -> str:
    """Return the SHA-256 of this package's Python files."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def describe_lineage(
    config: Config, origin: Mapping[str, str], models: Mapping[str, str]
) -> dict[str, Any]:
    """Return the record that is written to `lineage.json`.

    Args:
        config: of the stage.
        origin: hashes of data and tokenizer.
        models: role -> directory of each model that the stage started from or used.
    """
    parents = {
        role: {"dir": folder, "sha256": model_hash(Path(folder))} for role, folder in models.items()
    }
    return {
        "stage": config.stage.name,
        "parent": parents.get("policy") or parents.get("model"),
        "parents": parents,
        "data": {
            "name": config.data.name,
            "path": config.data.path,
            "fingerprint": origin["data"],
        },
        "tokenizer": origin["tokenizer"],
        "seed": config.run.seed,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def model_hash(folder: Path) -> str | None:
    """Return the SHA-256 of a model directory's weights; None when they are in several files."""
    path = folder / "model.safetensors"
    return hash_file(path) if path.exists() else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
