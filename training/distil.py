"""Distillation of a pre-gate from a trained model whose layers route for themselves.

The model is frozen; its routers, with their own choices, are the teacher. The pre-gate sees the
token ids alone and learns, per layer, the divergence KL(softmax(router) || softmax(pre-gate)).
Afterwards the pre-gate chooses, and the routers weigh what it chose.

Read first: `routers/ahead/pregate.py`, `routers/ahead/agreement.py`, `moe/model.py`.

Shapes:  T tokens on this rank   L MoE layers
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gatewise.moe.config import count_parameters
from gatewise.moe.model import Decoder, parameter_specs
from gatewise.moe.parallelize import build_model
from gatewise.parallel.buckets import make_buckets
from gatewise.parallel.collectives import Group
from gatewise.parallel.reducer import GradientReducer, gradient_squares
from gatewise.parallel.runtime import Runtime
from gatewise.routers.ahead.agreement import distillation_loss, mass_recall, recall_at_k
from gatewise.routers.ahead.config import AheadWeights
from gatewise.routers.ahead.pregate import PreGate
from gatewise.routers.api import Routing
from gatewise.training.blend import training_order
from gatewise.training.checkpoint_load import load
from gatewise.training.checkpointer import read_meta
from gatewise.training.config import TrainConfig
from gatewise.training.data import PreparedData
from gatewise.training.evaluate import Evaluation, evaluate
from gatewise.training.optim import ShardedAdamW, learning_rate
from gatewise.training.resume import Progress, RunCheckpoints
from gatewise.training.sequences import read_batch
from gatewise.training.sinks import MetricSink
from gatewise.training.state import model_ranges

__all__ = ["distil"]

_PREFIX = "ahead."  # of the pre-gate's parameters


def distil(
    config: TrainConfig,
    teacher: Path,
    *,
    runtime: Runtime,
    data: PreparedData,
    folder: Path,
    sinks: Sequence[MetricSink],
) -> dict[str, Any]:
    """Train the pre-gate and return what `result.json` shall hold.

    Args:
        config: from `distil_config.student_config`.
        teacher: checkpoint of the frozen model.
        runtime: this rank.
        data: tokens and tokenizer, the teacher's.
        folder: of the run; the model with its pre-gate is saved below it.
        sinks: get one record per logged step; empty on ranks other than 0.
    """
    model = _build(config, teacher, runtime, data)
    gate = model.ahead
    assert isinstance(gate, PreGate)
    trained = [spec for spec in parameter_specs(model) if spec.name.startswith(_PREFIX)]
    frozen = [p for name, p in model.named_parameters() if not name.startswith(_PREFIX)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    reducer = GradientReducer(make_buckets(trained, runtime.groups), ranks=runtime.world)
    optimizer = ShardedAdamW(reducer.buckets, config.optim)
    length = config.data.sequence_length
    order = training_order(data.blend, len(data.train), length, config.seed)
    control = runtime.groups.control
    share = config.batch.sequences // runtime.world
    sums = _Agreement(len(model.moe_layers()), runtime.device)
    for sink in sinks:
        sink.resume(0)
    model.eval()
    for step in range(config.steps):
        first = step * config.batch.sequences + runtime.rank * share
        batch = read_batch(data.train, order, range(first, first + share))
        token_BS = batch[:, :-1].to(runtime.device)
        reducer.begin(reduce=True)
        loss = _loss(model, gate, token_BS, sums)
        loss.backward()
        reducer.finish()
        lr = learning_rate(config.optim, step, config.steps)
        _update(optimizer, reducer, lr, clip=config.optim.clip, control=control)
        gate.advance()
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            record = {
                "step": step + 1,
                "steps": config.steps,
                "train/lr": lr,
                **sums.drain(control),
            }
            for sink in sinks:
                sink.write(record)
    found = _measure(model, gate, config, runtime, data)
    for parameter in frozen:
        parameter.requires_grad_(True)
    path = _save(model, config, runtime, data, folder, meta=read_meta(teacher)["meta"])
    counts = count_parameters(config.model, model.embedding.shape[0], config.router)
    return {
        "teacher": str(teacher),
        "checkpoint": str(path),
        "steps": config.steps,
        "tokens": config.steps * config.batch.sequences * config.data.sequence_length,
        "pregate": config.router.ahead.kind.name,
        "pregate_parameters": sum(spec.parameter.numel() for spec in trained),
        "parameters": counts.total,
        "router_parameters": counts.router,
        **found,
    }


class _Agreement:
    """Sums over tokens of how far the pre-gate agrees with each layer's router."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._sums = torch.zeros(3, layers, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, loss_L: Tensor, routings: Sequence[Routing], chosen_LTK: Tensor) -> None:
        """Add a batch: the divergence per layer, and what both sides chose."""
        tokens = chosen_LTK.shape[1]
        self._sums[0] += loss_L.detach() * tokens
        for layer, routing in enumerate(routings):
            assert routing.logits_TE is not None
            chosen_TK = chosen_LTK[layer if chosen_LTK.shape[0] > 1 else 0]
            self._sums[1, layer] += recall_at_k(routing.expert_TK, chosen_TK)
            self._sums[2, layer] += mass_recall(routing.logits_TE.softmax(-1), chosen_TK)
        self._tokens += tokens

    def drain(self, control: Group) -> dict[str, float]:
        """Return the means over all ranks, by layer and over all layers; start again."""
        packed = torch.cat((self._sums.flatten(), self._tokens))
        if control.handle is not None:
            dist.all_reduce(packed, group=control.handle)
        means_L = (packed[:-1] / packed[-1].clamp(min=1)).view_as(self._sums).tolist()
        self._sums.zero_()
        self._tokens.zero_()
        values: dict[str, float] = {}
        names = ("divergence", "recall", "mass_recall")
        for name, row in zip(names, means_L, strict=True):
            values[f"distil/{name}"] = sum(row) / len(row)
            values |= {f"distil/layer_{i:02d}/{name}": value for i, value in enumerate(row)}
        return values


def _build(config: TrainConfig, teacher: Path, runtime: Runtime, data: PreparedData) -> Decoder:
    """Build the model with a fresh pre-gate and fill the rest from the teacher."""
    model = build_model(
        config.model,
        config.router,
        vocab_size=config.embedding_rows(data.tokenizer.vocab_size),
        group=runtime.groups.experts,
        device=runtime.device,
        dtype=torch.float32,
        seed=config.seed,
    )
    wanted = {
        name: part
        for name, part in model_ranges(model).items()
        if not name.startswith(f"model/{_PREFIX}")
    }
    load(
        teacher,
        wanted,
        group=runtime.groups.checkpoint,
        optional_prefixes=("adam_m/", "adam_v/"),
    )
    return model


def _loss(model: Decoder, gate: PreGate, token_BS: Tensor, sums: _Agreement) -> Tensor:
    """Return the mean divergence over layers; note how far both sides agree."""
    with torch.no_grad():
        model.follows_ahead = False
        routings = model(token_BS).routings
        model.follows_ahead = True
    plan = gate.plan(token_BS)
    parts = []
    for layer, routing in enumerate(routings):
        student_TE = plan.layer(layer).logits_TE
        assert routing.logits_TE is not None
        assert student_TE is not None
        temperature = gate.config.temperature
        parts.append(distillation_loss(routing.logits_TE, student_TE, temperature=temperature))
    loss_L = torch.stack(parts)
    sums.add(loss_L, routings, plan.expert_LTK)
    return loss_L.mean()


def _update(
    optimizer: ShardedAdamW, reducer: GradientReducer, lr: float, *, clip: float, control: Group
) -> None:
    square = sum(gradient_squares(reducer.buckets).values(), torch.zeros(()))
    if control.handle is not None:
        dist.all_reduce(square, group=control.handle)
    norm = (square.sqrt() / reducer.divisor).float()
    factor = (norm / clip).clamp(min=1.0) if clip else torch.ones_like(norm)
    optimizer.step(lr, scale=(factor * reducer.divisor).float(), skip=torch.zeros_like(norm))
    reducer.clear()


@torch.no_grad()
def _measure(
    model: Decoder, gate: PreGate, config: TrainConfig, runtime: Runtime, data: PreparedData
) -> dict[str, Any]:
    """Score validation text: agreement, and the loss with each of the three ways to route."""
    control, length = runtime.groups.control, config.data.sequence_length
    tokens = data.validation.tokens[: config.evaluation.tokens or None]
    rows = max(len(tokens) // length, 1)
    sums = _Agreement(len(model.moe_layers()), runtime.device)
    step = config.evaluation.micro * runtime.world
    # whole steps, so that every rank makes equally many passes; at least one
    for start in range(0, max(rows // step, 1) * step, step):
        picked = [
            (start + runtime.rank * config.evaluation.micro + i) % rows
            for i in range(config.evaluation.micro)
        ]
        cut = [
            torch.from_numpy(tokens[r * length : (r + 1) * length].astype("int64")) for r in picked
        ]
        _loss(model, gate, torch.stack(cut).to(runtime.device), sums)
    agreement = sums.drain(control)

    def score() -> Evaluation:
        return evaluate(
            model,
            data,
            config.evaluation,
            sequence_length=length,
            control=control,
            device=runtime.device,
        )

    model.follows_ahead = False
    in_loop = score()
    model.follows_ahead = True
    ahead = score()
    own = gate.config
    gate.config = replace(own, weights=AheadWeights.pregate)
    weighted = score()
    gate.config = own
    layers = len(model.moe_layers())
    return {
        "recall": agreement["distil/recall"],
        "mass_recall": agreement["distil/mass_recall"],
        "divergence": agreement["distil/divergence"],
        "recall_per_layer": [agreement[f"distil/layer_{i:02d}/recall"] for i in range(layers)],
        "mass_recall_per_layer": [
            agreement[f"distil/layer_{i:02d}/mass_recall"] for i in range(layers)
        ],
        "chance_recall": config.model.top_k / config.model.num_experts,
        "val_loss": ahead.loss,
        "val_bits_per_byte": ahead.bits_per_byte,
        "val_loss_in_loop": in_loop.loss,
        "val_loss_pregate_weights": weighted.loss,
        "val_loss_ratio": ahead.loss / in_loop.loss,
        "val_tokens": ahead.tokens,
    }


def _save(
    model: Decoder,
    config: TrainConfig,
    runtime: Runtime,
    data: PreparedData,
    folder: Path,
    *,
    meta: dict[str, Any],
) -> Path:
    """Save the whole model as step 0 of a run that goes on where the teacher's text ended."""
    optimizer = ShardedAdamW(make_buckets(parameter_specs(model), runtime.groups), config.optim)
    checkpoints = RunCheckpoints(config, runtime, data, folder)
    try:
        progress = Progress(step=0, sample=int(meta["sample"]), tokens=int(meta["tokens"]))
        checkpoints.save(model, optimizer, progress, {})
        checkpoints.wait()
    finally:
        checkpoints.close()
    path = checkpoints.newest()
    assert path is not None
    return path
