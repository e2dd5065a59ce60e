"""Routers of every preset, and small inputs for them.

Shapes:  T tokens   E experts   K experts per token   D width
"""

from dataclasses import replace

import torch
from small_models import small_model
from torch import Tensor, nn

from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder
from gatewise.routers.api import ExpertColumns, Routing, RoutingContext
from gatewise.routers.presets import PRESETS, preset
from gatewise.routers.router import ComposedRouter, build_cell, build_router

D, E, K, VOCAB = 12, 6, 2, 50
# routers that choose in each layer; those that choose ahead are in test_pregate.py
FAMILY = sorted(name for name in PRESETS if not name.endswith("pregate"))
FIXED = sorted(set(FAMILY) - {"top_p", "remoe", "expert_choice", "soft"})  # always K experts
ROWWISE = sorted(set(FAMILY) - {"expert_choice", "sinkhorn", "soft"})  # each token by itself


def make(name: str, *, top_k: int = K, hidden: int = D, **changes: object) -> ComposedRouter:
    """Build a preset's router with lively weights, in evaluation."""
    config = replace(preset(name), **changes)  # type: ignore[arg-type]
    torch.manual_seed(1)
    router = build_router(
        config, hidden, E, top_k, cell=build_cell(config, hidden), vocab_size=VOCAB
    )
    for parameter in router.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter)
    return router.eval()


def context_of(num_tokens: int, *, sequences: int = 1, **more: object) -> RoutingContext:
    generator = torch.Generator().manual_seed(9)
    ids_T = torch.randint(VOCAB, (num_tokens,), generator=generator)
    columns = ExpertColumns(
        torch.randn(E, D, generator=generator), torch.rand(E, D, generator=generator)
    )
    return RoutingContext(token_ids=ids_T, sequences=sequences, columns=columns, **more)  # type: ignore[arg-type]


def tokens(num_tokens: int, seed: int = 0, width: int = D) -> Tensor:
    return torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))


def route(name: str, x_TD: Tensor, **changes: object) -> Routing:
    return make(name, **changes)(x_TD, context_of(x_TD.shape[0]), 0)[0]


def decoder(name: str, *, layers: int = 3, dense: int = 0, **changes: object) -> Decoder:
    config = replace(preset(name), allow_noncausal=True, **changes)  # type: ignore[arg-type]
    sizes = ModelConfig(
        layers=layers,
        hidden=D,
        heads=2,
        num_experts=E,
        top_k=K,
        expert_width=8,
        dense_layers=dense,
        init_std=0.3,
    )
    return small_model(sizes, config, vocab_size=VOCAB)


def token_ids() -> Tensor:
    return torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(6))
