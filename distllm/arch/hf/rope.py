"""Rotary settings of a config.json, in the nested form of transformers 5 and in the older ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distllm.errors import CheckpointError
from distllm.layers.rope_scaling import SCALINGS

_OWN = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(config: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """Read settings that hold for all layers: `rope_theta`, `rope_scaling`, `rope_fraction`.

    Args:
        config: config.json.
        theta: what the family takes where none is given.
    """
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    found = given.get("rope_theta", config.get("rope_theta"))
    fraction = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return {
        "rope_theta": float(theta if found is None else found),
        "rope_scaling": _scaling(given),
        "rope_fraction": float(1.0 if fraction is None else fraction),
    }


def write_rope(options: Any) -> dict[str, Any]:
    """Write what `read_rope` reads; `rope_theta` stands outside too, for transformers before 5."""
    inner = {"rope_type": "default", "rope_theta": options.rope_theta, **options.rope_scaling}
    if options.rope_fraction != 1.0:
        inner["partial_rotary_factor"] = options.rope_fraction
    return {"rope_theta": options.rope_theta, "rope_parameters": inner}


def read_rope_by_type(
    config: Mapping[str, Any],
    theta: float,
    local_theta: float,
    old_names: tuple[str, str] = ("rope_theta", "rope_local_base_freq"),
) -> dict[str, Any]:
    """Read settings that differ between full and windowed layers.

    Args:
        config: config.json.
        theta: of full layers, where none is given.
        local_theta: of windowed layers, where none is given.
        old_names: what older files call the two.
    """
    nested = config.get("rope_parameters") or {}
    full = {**(config.get("rope_scaling") or {}), **(nested.get("full_attention") or {})}
    local = nested.get("sliding_attention") or {}
    if _scaling(local):
        raise CheckpointError(
            f"config.json stretches the rotary wavelengths of windowed layers ({local}); only those of full layers "
            "can be."
        )
    base = full.get("rope_theta", config.get(old_names[0]))
    local_base = local.get("rope_theta", config.get(old_names[1]))
    return {
        "rope_theta": float(theta if base is None else base),
        "rope_local_theta": float(local_theta if local_base is None else local_base),
        "rope_scaling": _scaling(full),
    }


def write_rope_by_type(options: Any) -> dict[str, Any]:
    """Write what `read_rope_by_type` reads."""
    local = options.rope_theta if options.rope_local_theta is None else options.rope_local_theta
    return {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": options.rope_theta,
                **options.rope_scaling,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    }


def _scaling(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return {}
    if kind not in SCALINGS:
        raise CheckpointError(
            f"config.json has rope_type={kind}; readable are default, {', '.join(SCALINGS)}."
        )
    rest = {k: v for k, v in given.items() if k not in _OWN and v is not None}
    return {"rope_type": kind, **rest}
