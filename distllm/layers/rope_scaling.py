"""Rotary frequencies, and the three ways of stretching them for longer contexts. Tables are made in `positions.py`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distllm.errors import ConfigError
from distllm.registry import unknown_name

SCALINGS = ("linear", "llama3", "yarn")

_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def check_scaling(scaling: Mapping[str, Any]) -> None:
    """Refuse a scaling that is unknown or lacks a number.

    Raises:
        ConfigError: it names the known ones, or the numbers that are missing.
    """
    if not scaling:
        return
    kind = scaling.get("rope_type", "")
    if kind not in SCALINGS:
        raise ConfigError(unknown_name("rope_type", str(kind), SCALINGS))
    missing = [key for key in _NEEDED[kind] if scaling.get(key) is None]
    if missing:
        raise ConfigError(f"arch.rope_scaling with rope_type={kind} lacks {', '.join(missing)}.")


def frequencies(
    dim: int, theta: float, scaling: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, float]:
    """Return the angle per position of every pair of channels, and the factor on cosines and sines.

    Args:
        dim: how many channels are rotated, even.
        theta: base of the geometric series.
        scaling: `rope_type` and its numbers; empty = none.
        dtype: of the result, float32 or wider.
        device: where to put it.

    Returns:
        ([dim / 2], factor).
    """
    channels = torch.arange(0, dim, 2, dtype=dtype, device=device)
    plain = 1.0 / theta ** (channels / dim)
    kind = scaling.get("rope_type")
    if kind == "linear":
        return plain / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(plain, dim, theta, scaling)
    return plain, 1.0


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Divide the frequencies of long wavelengths by `factor`, keep those of short ones, blend between.

    Reference: Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv 2407.21783; the blend follows Meta's code.
    """
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * plain / (2 * math.pi)  # of this pair over the original context
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * plain / factor + share * plain


def _yarn(
    plain: Tensor, dim: int, theta: float, scaling: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """Divide the frequencies of pairs that turn seldom by `factor`, keep those of pairs that turn often.

    Reference: Peng et al. 2023, YaRN, arXiv 2309.00071, equations 17 to 22.
    """
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(scaling.get("beta_fast") or 32)
    last = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(dim // 2, dtype=plain.dtype, device=plain.device)
    stretched = ((pairs - first) / (last - first)).clamp(0, 1)
    return plain / factor * stretched + plain * (1 - stretched), _yarn_factor(scaling)


def _yarn_factor(scaling: Mapping[str, Any]) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def grown(slope: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * slope * math.log(scaling["factor"]) + 1.0

    slope, slope_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(slope) / grown(slope_all) if slope and slope_all else grown(1.0)
