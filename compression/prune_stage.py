"""The stage of a compression that calibrates dynamic pruning, a file per layer.

    calibration/prune_*.json       what each layer's tokens say (`thresholds.py`)
    .compressed.partial/prune.json the rule of every layer

The calibration sequences go through the quantised blocks twice: once to find the thresholds of all
layers, once with all of them in force, to count which experts still run.

Shapes:  E experts
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.compression.artefact import fill_model, replace_file
from gatewise.compression.config import PruneConfig, PruneRule
from gatewise.compression.plan import Plan
from gatewise.compression.pruning import PRUNE_FILE, Pruning, apply_pruning
from gatewise.compression.stream import BlockStream
from gatewise.compression.thresholds import LayerThresholds, choose_rules, measure_thresholds
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import ConfigError
from gatewise.routers.config import Selector
from gatewise.training.config import TrainConfig

__all__ = ["PruneStage", "check_prunable", "count_choices"]


def check_prunable(config: TrainConfig, prune: PruneConfig) -> None:
    """Refuse to prune a model whose tokens have nothing to drop.

    Raises:
        ConfigError: with the reason.
    """
    if prune.rule is PruneRule.none:
        return
    if not config.model.moe_layers():
        raise ConfigError(f"prune is {prune.rule.name}, but this model has no experts")
    if config.router.selector is Selector.soft:
        raise ConfigError(
            f"prune is {prune.rule.name}, but with router.selector=soft every expert gets a mix "
            "of all tokens, and no token can leave one out"
        )
    varying = (Selector.top_p, Selector.threshold, Selector.expert_choice)
    fixed = config.router.selector not in varying
    if fixed and config.model.top_k == 1:
        raise ConfigError(
            f"prune is {prune.rule.name}, but model.top_k is 1 and a token's only expert always "
            "stays"
        )
    if fixed and prune.rule is PruneRule.budget and prune.keep * config.model.top_k < 1:
        raise ConfigError(
            f"prune.keep is {prune.keep:g}, but the largest of a token's {config.model.top_k} "
            f"experts always stays; it must be at least {1 / config.model.top_k:.4g}"
        )


@dataclass(frozen=True, slots=True)
class PruneStage:
    """What the stage works on."""

    make_stream: Callable[[], BlockStream]
    inputs: Sequence[Tensor]  # token ids (B, S) of the batches
    plan: Plan
    calibration: Path
    partial: Path
    progress: Callable[[str, int, int], None]

    def find(self, config: PruneConfig) -> tuple[Pruning, list[LayerThresholds]]:
        """Measure the layers that were not yet, and write the rule.

        Raises:
            ConfigError: for a budget that cannot be met.
            DataError: if an input is not finite.
        """
        layers = sorted({part.layer for part in self.plan.parts if part.kind == "expert"})
        files = {layer: self.calibration / f"prune_{layer:03d}.json" for layer in layers}
        if not all(file.exists() for file in files.values()):
            for stream, layer in self._blocks("prune", self.make_stream()):
                if layer in files and not files[layer].exists():
                    found = measure_thresholds(stream, stream.block(layer), config)
                    replace_file(files[layer], found.to_json())
                stream.advance(stream.block(layer))
        all_found = [LayerThresholds.from_json(file.read_text()) for file in files.values()]
        pruning = choose_rules(all_found, config)
        replace_file(self.partial / PRUNE_FILE, pruning.to_json())
        return pruning, all_found

    def count(self, pruning: Pruning | None) -> dict[int, list[int]]:
        """Return per layer how many tokens each expert gets, with all layers pruned or none."""
        stream = self.make_stream()
        if pruning is not None:
            apply_pruning(stream.model, pruning)
        counts: dict[int, list[int]] = {}
        for _, layer in self._blocks("count", stream):
            for routing in stream.advance(stream.block(layer)):
                if routing is None:
                    continue
                chosen_N = routing.expert_TK[routing.expert_TK >= 0]
                number = stream.model.config.num_experts
                here = torch.bincount(chosen_N, minlength=number).tolist()
                before = counts.get(layer, [0] * number)
                counts[layer] = [a + b for a, b in zip(before, here, strict=True)]
        return counts

    def _blocks(self, stage: str, stream: BlockStream) -> Iterator[tuple[BlockStream, int]]:
        """Yield each layer while its quantised block is in memory."""
        model, plan = stream.model, self.plan
        stream.begin(self.inputs, adjust=lambda: fill_model(model, self.partial, plan, [0]))
        for layer in range(plan.layers):
            with stream.resident(layer, load=False):
                fill_model(model, self.partial, plan, [layer + 1])
                yield stream, layer
            self.progress(stage, layer + 1, plan.layers)


@contextmanager
def count_choices(model: Decoder) -> Iterator[list[int]]:
    """Count the experts that all tokens of all calls get, in the one item of the list."""
    total = [0]

    def add(_module: nn.Module, _arguments: Any, output: Any) -> None:
        total[0] += int((output[1].expert_TK >= 0).sum())

    hooks = [layer.register_forward_hook(add) for layer in model.moe_layers()]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()
