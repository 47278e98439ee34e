"""Tensors by name in safetensors files: written piece by piece, divided among ranks, read one tensor at a time.

The library writes a file in one go from one copy in memory; here the bytes go out tensor by tensor and are hashed on
the way. Which files make a checkpoint is in `checkpoint.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from distllm.errors import EngineError
from distllm.train.files import write_file

Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""Tensors by name; an iterable is walked once, so that each tensor may be made when it is its turn."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def share(named: Named, rank: int, size: int, copy: bool = False) -> dict[str, Tensor]:
    """Walk all of `named` and keep, on the CPU, what falls to `rank`: each tensor goes where the fewest bytes are yet.

    All ranks come to the same division without a word, because they see the same names and shapes in the same order.
    With `copy` the result shares no memory with what may change afterwards.
    """
    taken = [0] * size
    mine = {}
    for name, tensor in named.items() if isinstance(named, Mapping) else named:
        owner = min(range(size), key=taken.__getitem__)
        taken[owner] += tensor.nbytes
        if owner == rank:
            mine[name] = tensor.detach().to("cpu", copy=copy)
    return mine


def refuse_non_finite(path: Path, shares: Iterable[Mapping[str, Tensor]]) -> None:
    """Keep weights that are ruined out of the checkpoint `path`: it would outlive the good ones.

    Raises:
        EngineError: a weight is not a finite number.
    """
    for part in shares:
        for name, tensor in part.items():
            if name.startswith("weight/") and not torch.isfinite(tensor).all():
                raise EngineError(
                    f"Checkpoint {path} was not written: {name} is not finite. Earlier checkpoints are untouched. "
                    "Lower optim.lr or set train.precision=fp32, then start again to go on from the last one."
                )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], midway: str = "") -> dict[str, Any]:
    """Write `tensors` to a new safetensors file and make it durable; return its `bytes` and `sha256`.

    Raises:
        TypeError: a dtype has no name in the format.
    """
    # Wide dtypes first, as the library does, so that every tensor is aligned to its dtype.
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, which a checkpoint does not keep")
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text, *(_bytes_of(tensors[n]) for n in names)]
    digest = write_file(path, *parts, midway=midway)
    return {"bytes": 8 + len(text) + end, "sha256": digest}


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of several safetensors files as one mapping; each is read when it is looked up."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [safetensors.safe_open(path, framework="pt") for path in paths]
        self._home = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._home[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
