"""Files of a model directory: JSON, tensors in safetensors or in a pickle that holds nothing else, a folder put in place.

What the tensors mean is in `hf/`, which model they make in `io.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distllm.errors import CheckpointError

_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a model directory: it has no config.json. Give the directory that holds "
            "config.json and model.safetensors (a run's is RUN/model)."
        )
    return read_json(path)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read model.safetensors, or the shards that model.safetensors.index.json lists; without them pytorch_model.bin.

    Raises:
        CheckpointError: a file is missing or damaged, or is a pickle that holds more than tensors.
    """
    for name, read in ((_SAFE, _read_safetensors), (_PICKLED, _read_pickle)):
        if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
            return _read_all(folder, name, read)
    raise CheckpointError(
        f"{folder} holds no weights: neither {_SAFE} nor {_PICKLED}, nor an index of their parts."
    )


def _read_all(
    folder: Path, name: str, read: Callable[[Path], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    index = folder / f"{name}.index.json"
    files = [folder / name]
    if index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}.") from error
        files = [folder / shard for shard in sorted(set(shards))]
    tensors: dict[str, Tensor] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {index.name} lists it.")
        tensors |= read(path)
    return tensors


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}.") from error


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    """Read a pickle through torch's restricted reader, which runs no code of the file."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, RuntimeError | EOFError | OSError | ValueError):
            raise CheckpointError(
                f"{path} is damaged or cut short: {str(error).splitlines()[0]}"
            ) from error
        raise CheckpointError(
            f"{path} is a pickle that holds more than tensors, and reading it could run code. Ask for the model in "
            f"safetensors, or convert the file where you trust it. Torch says: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{path} holds no table of tensors.")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one.

    Raises:
        CheckpointError: it is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error


def beside(folder: Path, kind: str) -> Path:
    """Return where this process keeps a half-written (`tmp`) or replaced (`old`) folder."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.{kind}")


def clear_debris(folder: Path) -> None:
    """Remove what earlier, killed writers left beside `folder`."""
    for kind in ("tmp", "old"):
        for path in folder.parent.glob(f".{folder.name}.*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def put_in_place(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`, replacing what is there; on the disk before it has its name, lest power fail between."""
    old = beside(folder, "old")
    for path in [*aside.rglob("*"), aside]:
        _sync(path)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's names, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
