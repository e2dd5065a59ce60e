"""Runs that hold a small model with drawn weights, without training one."""

from pathlib import Path
from typing import Any

import torch
from small_models import small_model
from torch import Tensor

from gatewise.conf.compose import config_to_yaml
from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder
from gatewise.routers.config import RouterConfig
from gatewise.training.checkpoint_weights import write_weights
from gatewise.training.config import DataConfig, TrainConfig
from gatewise.training.resume import to_plain
from gatewise.training.state import model_ranges
from gatewise.training.tokenizer import ByteTokenizer

__all__ = ["drawn_model", "make_run", "state_of"]

VOCAB = 257


def drawn_model(model: ModelConfig, router: RouterConfig) -> Decoder:
    """Build a model whose every number is drawn, norms, biases and routers' states too."""
    decoder = small_model(model, router, vocab_size=VOCAB)
    generator = torch.Generator().manual_seed(3)
    for name, part in sorted(model_ranges(decoder).items()):
        if part.data.is_floating_point():
            drawn = torch.randn(part.data.shape, generator=generator)
            part.data.copy_(1 + 0.2 * drawn if name.endswith("gain") else 0.3 * drawn)
    return decoder


def state_of(decoder: Decoder) -> dict[str, Tensor]:
    """Return copies of all weights and states by their names in a checkpoint."""
    return {
        name: part.data.clone().view(part.shape) for name, part in model_ranges(decoder).items()
    }


def make_run(
    folder: Path, decoder: Decoder, *, biases: bool = False, **meta: Any
) -> tuple[Path, TrainConfig]:
    """Write a run's folder with one checkpoint of the model; return folder and settings.

    Args:
        folder: of the run.
        decoder: the model.
        biases: keep the balancing biases; else they are 0, as of a router without one.
        meta: further entries of the checkpoint's own.
    """
    data = DataConfig(sequence_length=32)
    config = TrainConfig(model=decoder.config, router=decoder.router_config, data=data)
    state = state_of(decoder)
    if not biases:
        state = {n: t.zero_() if n.startswith("bias/") else t for n, t in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_to_yaml(config))
    ByteTokenizer().save(folder / "tokenizer.json")
    counts = dict.fromkeys(("sample", "tokens", "skipped", "skipped_in_a_row", "updates"), 0)
    described = {
        **counts,
        "step": 5,
        "config": to_plain(config),
        "vocab_size": decoder.embedding.shape[0],
        "tokenizer": ByteTokenizer().fingerprint,
        "data": None,
        **meta,
    }
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
    write_weights(
        folder / "checkpoints", shapes, state.__getitem__, meta=described, step=described["step"]
    )
    return folder, config
