"""The random state of the whole process as tensors, so that it is saved without pickle."""

import logging
import random

import numpy as np
import torch
from torch import Tensor

from distllm.errors import CheckpointError

_log = logging.getLogger("distllm")


def seed_all(seed: int, rank: int = 0) -> None:
    """Seed every global generator that `rng_state` saves; ranks draw different noise, rank 0 that of a single process."""
    seed = seed if rank == 0 else int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rng_state() -> dict[str, Tensor]:
    """Return the state of torch's CPU and CUDA generators, `random`, and NumPy's global generator.

    `torch.cpu` and `torch.cuda.N` are uint8; `python` and `numpy` are [626] and [625] int64 (the words of
    the Mersenne twister, then its position); `python.gauss` and `numpy.gauss` are [2] float64: whether a
    normal deviate is waiting, and which.
    """
    state = {"torch.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, tensor in enumerate(torch.cuda.get_rng_state_all()):
            state[f"torch.cuda.{index}"] = tensor
    version, words, gauss = random.getstate()
    state["python"] = torch.tensor([version, *words], dtype=torch.int64)
    state["python.gauss"] = _gauss(gauss is not None, gauss or 0.0)
    twister = np.random.get_state(legacy=False)
    if twister["bit_generator"] == "MT19937":
        words = [*twister["state"]["key"].tolist(), twister["state"]["pos"]]
        state["numpy"] = torch.tensor(words, dtype=torch.int64)
        state["numpy.gauss"] = _gauss(bool(twister["has_gauss"]), twister["gauss"])
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what `rng_state` returned. GPUs that were not there when it was saved keep their state.

    Raises:
        CheckpointError: `state` lacks a generator that every process has.
    """
    missing = {"torch.cpu", "python", "python.gauss"} - state.keys()
    if missing:
        raise CheckpointError(f"The saved random state lacks {', '.join(sorted(missing))}.")
    torch.set_rng_state(state["torch.cpu"].cpu())
    saved_gpus = sum(key.startswith("torch.cuda.") for key in state)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(min(gpus, saved_gpus)):
        torch.cuda.set_rng_state(state[f"torch.cuda.{index}"].cpu(), index)
    if gpus != saved_gpus:
        _log.warning("Random state was saved with %d GPUs; this machine has %d.", saved_gpus, gpus)
    version, *words = state["python"].tolist()
    waiting, value = state["python.gauss"].tolist()
    random.setstate((version, tuple(words), value if waiting else None))
    if "numpy" in state:
        *key, position = state["numpy"].tolist()
        waiting, value = state["numpy.gauss"].tolist()
        np.random.set_state(("MT19937", np.array(key, np.uint32), position, int(waiting), value))


def _gauss(waiting: bool, value: float) -> Tensor:
    return torch.tensor([float(waiting), value], dtype=torch.float64)
