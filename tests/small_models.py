"""Models on one rank, for tests that do not mind where a model lies."""

import torch

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder
from gatewise.moe.parallelize import build_model
from gatewise.parallel.collectives import NO_GROUP
from gatewise.routers.config import RouterConfig

__all__ = ["small_model"]


def small_model(
    sizes: ModelConfig,
    router: RouterConfig,
    *,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Decoder:
    """Build a model with all of its experts on the CPU."""
    return build_model(
        sizes,
        router,
        vocab_size=vocab_size,
        group=NO_GROUP,
        device=torch.device("cpu"),
        dtype=dtype,
        seed=seed,
    )
