"""Memory of one rank: weights, gradients, optimizer state and activations.

Read `shapes.py` and `parallel/schedule/profiles.py` first. Weights are kept in two bytes and their
gradients in the workload's bytes; AdamW keeps a master copy and two moments in fp32, spread over
the copies of each tensor. With one-forward-one-backward the first pipeline stage holds the
activations of as many micro-batches as there are stages.
"""

from dataclasses import dataclass

from gatewise.moe.planning.block import Workload
from gatewise.moe.planning.shapes import ModelShape
from gatewise.parallel.schedule.profiles import Layout

__all__ = ["Memory", "StageBlocks", "rank_memory", "split_blocks"]

_WEIGHT_BYTES = 2
_OPTIMIZER_BYTES = 12  # fp32 master weight and two moments
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the fullest rank, in GB (1e9 bytes)."""

    weights_gb: float
    gradients_gb: float
    optimizer_gb: float
    activations_gb: float

    @property
    def total_gb(self) -> float:
        """The sum."""
        return self.weights_gb + self.gradients_gb + self.optimizer_gb + self.activations_gb


@dataclass(frozen=True, slots=True)
class StageBlocks:
    """Blocks of one pipeline stage."""

    dense: int
    moe: int
    first: bool  # turns tokens into vectors
    last: bool  # turns vectors into logits

    @property
    def total(self) -> int:
        """Number of blocks."""
        return self.dense + self.moe


def split_blocks(shape: ModelShape, stages: int) -> list[StageBlocks]:
    """Return the blocks of each pipeline stage: consecutive, as even as possible.

    Where the blocks do not divide evenly, the middle stages take one more: the outer ones also
    have the embedding and the logits.

    Raises:
        ValueError: if there are more stages than blocks.
    """
    if stages > shape.layers:
        raise ValueError(
            f"pipeline is {stages}, more than the {shape.layers} layers of {shape.name}"
        )
    least, more = divmod(shape.layers, stages)
    middle_first = sorted(range(stages), key=lambda s: (s in (0, stages - 1), s == stages - 1, s))
    counts = [least] * stages
    for stage in middle_first[:more]:
        counts[stage] += 1
    blocks = []
    start = 0
    for stage, count in enumerate(counts):
        dense = max(0, min(shape.dense_layers - start, count))
        blocks.append(StageBlocks(dense, count - dense, stage == 0, stage == stages - 1))
        start += count
    return blocks


def rank_memory(
    shape: ModelShape, layout: Layout, workload: Workload, *, micro_batches: int = 1
) -> Memory:
    """Return the memory of the fullest rank.

    Args:
        shape: the model.
        layout: how it is split.
        workload: one micro-batch.
        micro_batches: of a step; no more than these are held at once.
    """
    stages = split_blocks(shape, layout.pipeline)
    return max(
        (
            _stage_memory(shape, layout, workload, blocks, min(micro_batches, len(stages) - i))
            for i, blocks in enumerate(stages)
        ),
        key=lambda memory: memory.total_gb,
    )


def _stage_memory(
    shape: ModelShape, layout: Layout, workload: Workload, blocks: StageBlocks, held: int
) -> Memory:
    attention = shape.attention_parameters() * blocks.total
    network = (shape.router_parameters() + shape.shared_parameters()) * blocks.moe
    network += shape.dense_parameters() * blocks.dense
    tables = shape.vocab * shape.hidden
    outer = tables * (blocks.first + (blocks.last and not (shape.tied_embeddings and blocks.first)))
    dense = (attention + network + outer) / layout.shard
    experts = blocks.moe * shape.experts * shape.expert_parameters()
    held_here = experts / (layout.expert * layout.shard)
    owned = dense / layout.data + held_here / layout.copies
    per_token = blocks.dense * _block_bytes(shape, workload, dense=True)
    per_token += blocks.moe * _block_bytes(shape, workload, dense=False)
    activations = held * workload.tokens * per_token / layout.shard
    if blocks.last:
        activations += workload.tokens * shape.vocab * 4 / layout.shard  # logits in fp32
    return Memory(
        (dense + held_here) * _WEIGHT_BYTES / _GB,
        (dense + held_here) * workload.gradient_bytes / _GB,
        owned * _OPTIMIZER_BYTES / _GB,
        activations / _GB,
    )


def _block_bytes(shape: ModelShape, workload: Workload, *, dense: bool) -> float:
    """Return the bytes that one token leaves for backward in one block.

    Kept: the inputs of block, norms and projections, queries, keys, values and attention's result,
    and for each row of the network its input and the inner products; with recomputation only the
    block's input.
    """
    if workload.recompute:
        return shape.hidden * workload.activation_bytes
    heads = shape.heads * (shape.query_dim + shape.head_value_dim)
    heads += shape.kv_heads * (shape.query_dim + shape.head_value_dim)
    inner = shape.matrices  # gate, up and their product, or one and its activation
    if dense:
        rows: float = shape.hidden + inner * shape.dense_width
    else:
        count = shape.top_k * workload.load + shape.shared_experts
        # of each row also the result, for the gradient of the combine weights
        rows = count * (2 * shape.hidden + inner * shape.expert_width)
    return (4 * shape.hidden + heads + rows) * workload.activation_bytes
