"""Packed weights with their experts on two ranks: what one rank with all of them gives."""

from pathlib import Path

import pytest
import torch
from compressed_models import compressed, settings, trained

from gatewise.compression.artefact import read_plan
from gatewise.compression.config import PruneConfig, PruneRule
from gatewise.compression.load import load_compressed
from gatewise.compression.pruning import apply_pruning, read_pruning
from gatewise.compression.runtime import load_packed, weight_bytes
from gatewise.moe.attention import KeyValueCache
from gatewise.moe.model import Decoder
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import make_groups
from gatewise.training.config import TrainConfig
from ranks import run_ranks

CPU = torch.device("cpu")


def logits(model: Decoder, token_BS: torch.Tensor) -> torch.Tensor:
    return model.logits(model(token_BS).hidden_BSD)


def decoded(model: Decoder, token_S: torch.Tensor) -> torch.Tensor:
    cache = KeyValueCache()
    rows = [model(token.view(1, 1), cache=cache).hidden_BSD[0, 0] for token in token_S]
    return model.logits(torch.stack(rows))


@torch.no_grad()
def check(rank: int, world: int, path: Path, config: TrainConfig) -> None:
    groups = make_groups(ParallelConfig(ranks=world, expert=world)).experts
    plan, pruning = read_plan(path), read_pruning(path)
    assert pruning is not None
    generator = torch.Generator().manual_seed(rank)  # every rank has its own tokens
    token_BS = torch.randint(257, (2, 40 - 9 * rank), generator=generator)
    for load in (load_packed, load_compressed):
        alone = load(config, 257, path, plan, CPU)
        spread = load(config, 257, path, plan, CPU, groups)
        for model in (alone, spread):
            apply_pruning(model, pruning)
        torch.testing.assert_close(
            logits(spread, token_BS), logits(alone, token_BS), atol=0.02, rtol=0.02
        )
        # one token each: both ranks' rows of an expert are few, and rounded alike
        torch.testing.assert_close(
            decoded(spread, token_BS[0, :6]), decoded(alone, token_BS[0, :6])
        )
        whole, part = weight_bytes(alone), weight_bytes(spread)
        experts = sum(
            layer.packed.nbytes
            if layer.packed is not None
            else sum(weight.nbytes for weight in layer.experts.parameters())
            for layer in alone.moe_layers()
        )
        assert whole - experts < part < whole - 0.3 * experts  # widths differ between experts


@pytest.mark.dist
def test_packed_experts_on_two_ranks_give_what_one_rank_gives(tmp_path: Path) -> None:
    source, config, _ = trained(tmp_path)
    prune = PruneConfig(rule=PruneRule.ratio)
    path, _ = compressed(source, settings(bits=2.8, prune=prune), tmp_path / "small")
    run_ranks(check, args=(path, config))
