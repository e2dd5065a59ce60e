"""Mixture-of-Experts layers; `from gatewise.moe import MoE` is the public layer.

Read first: `layer.py`, then `compute.py` (the stages), `dispatch.py` (how rows travel).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise.moe.layer import MoE

__all__ = ["MoE"]


def __getattr__(name: str) -> Any:
    """Import the layer when it is asked for, so that settings load without torch."""
    if name == "MoE":
        from gatewise.moe.layer import MoE

        return MoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
