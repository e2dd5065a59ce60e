"""Memory of one rank of a training run, computed from its settings before anything is allocated.

Sizes of parameters come from the model built on the meta device, so every router and layout counts
as it is. Activations are counted tensor by tensor: what autograd keeps of a block, and what its
backward pass needs beside it. On a CPU the C allocator keeps what was freed (`runtime.py`), so the
peak of the process is that of the fullest moment. The copy of a checkpoint stays from the first
save on, for the next one:

    parameters + gradients + optimizer + exchange
        + the larger of  a step,  an evaluation beside the copy

Shapes:  T tokens of a micro-batch   K experts per token   R rows received   D model width
         G, F see `moe/ops/grouped_ffn.py`   V vocabulary   a bytes of an activation
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gatewise.moe.config import Activation
from gatewise.moe.model import Decoder, parameter_specs, set_precision
from gatewise.moe.parallelize import apply_expert_parallel, apply_tensor_parallel
from gatewise.parallel.collectives import NO_GROUP, Group, Traffic
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import ExpertGroups
from gatewise.parallel.parameters import ParameterSpec
from gatewise.routers.config import Selector
from gatewise.training.config import Tokenizer, TrainConfig
from gatewise.training.data import PreparedData

__all__ = ["MemoryEstimate", "estimate_memory", "vocabulary"]

_WIDE = 4  # bytes of fp32
_BYTE_TOKENS = 257
_MB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory of the fullest rank by what holds it, in MiB."""

    parameters: float
    gradients: float
    optimizer: float  # moments, and master weights where they are copies
    exchange: float  # other ranks' gradients of what is sharded; all are under way at a step's end
    activations: float  # kept for the backward pass, at its fullest
    receive: float  # of these, rows that came from other ranks, at the stated imbalance
    backward: float  # what the pass needs beside them
    logits: float  # and what their gradient needs
    evaluation: float
    snapshot: float  # copy of a checkpoint that is being written
    text: float  # pages of the token file that the run reads
    saves_early: bool  # whether steps follow the first save

    @property
    def state(self) -> float:
        """What stays from step to step, or is kept for the next one by the C allocator."""
        return self.parameters + self.gradients + self.optimizer + self.exchange

    @property
    def step(self) -> float:
        """What a step needs beside the state."""
        return self.activations + max(self.logits, self.backward)

    @property
    def total(self) -> float:
        """The peak without the process's own base."""
        before = self.snapshot if self.saves_early else 0.0
        fullest = max(before + self.step, self.snapshot + self.evaluation)
        return self.state + fullest + self.text


def vocabulary(config: TrainConfig, data: PreparedData | None = None) -> int:
    """Return the number of token ids of a run; exact where the data is prepared."""
    if data is not None:
        return data.tokenizer.vocab_size
    if config.data.tokenizer_path is not None:
        from pathlib import Path

        from gatewise.training.tokenizer import load_tokenizer

        return load_tokenizer(Path(config.data.tokenizer_path)).vocab_size
    return _BYTE_TOKENS if config.data.tokenizer is Tokenizer.bytes else config.data.vocab_size


def estimate_memory(
    config: TrainConfig, vocab_size: int, *, number_bytes: int, imbalance: float = 1.2
) -> MemoryEstimate:
    """Return the memory of the fullest rank.

    Args:
        config: of the run.
        vocab_size: V.
        number_bytes: of a number in forward and backward, a.
        imbalance: rows of the rank that gets most over the mean, where experts are spread.
    """
    specs = _local_parameters(config, vocab_size, number_bytes)
    shares = [_share(spec, config.parallel) for spec in specs]
    sizes = [spec.parameter.numel() for spec in specs]
    wide = [max(_WIDE, spec.parameter.element_size()) for spec in specs]
    values = sum(s * spec.parameter.element_size() for s, spec in zip(sizes, specs, strict=True))
    owned = sum(s * w / n for s, w, n in zip(sizes, wide, shares, strict=True))
    copies = sum(
        s * w / n
        for s, w, n, spec in zip(sizes, wide, shares, specs, strict=True)
        if spec.parameter.element_size() != w
    )
    sharded = sum(s * w for s, w, n in zip(sizes, wide, shares, strict=True) if n > 1)
    every = config.checkpoint.every
    work = _Work(config, vocab_size, number_bytes, imbalance)
    read = config.steps * config.batch.sequences / config.parallel.ranks
    token_bytes = 2 if vocab_size <= 1 << 16 else 4
    return MemoryEstimate(
        parameters=values / _MB,
        gradients=sum(s * w for s, w in zip(sizes, wide, strict=True)) / _MB,
        optimizer=(2 * owned + copies) / _MB,
        exchange=sharded / _MB,
        activations=work.kept() / _MB,
        receive=work.received() / _MB,
        backward=(work.beside() + _largest_gradient(specs, number_bytes)) / _MB,
        logits=work.logits() / _MB,
        evaluation=work.evaluation() / _MB,
        snapshot=3 * owned / _MB,
        text=read * config.data.sequence_length * token_bytes / _MB,
        saves_early=every is not None and every < config.steps,
    )


class _Work:
    """Bytes of activations of one micro-batch on the fullest rank."""

    def __init__(
        self, config: TrainConfig, vocab: int, number_bytes: int, imbalance: float
    ) -> None:
        self._config, self._vocab, self._a = config, vocab, number_bytes
        parallel, model = config.parallel, config.model
        share = config.batch.sequences * parallel.tensor // parallel.ranks
        sequences = config.batch.micro or share
        self._tokens = sequences * config.data.sequence_length // parallel.tensor
        self._all_tokens = sequences * config.data.sequence_length
        spread = parallel.expert_ranks > 1
        self._load = imbalance if spread else 1.0
        self._most_k: float = model.top_k
        if config.router.selector is Selector.expert_choice:
            self._most_k = config.router.choice_factor * model.top_k

    def kept(self) -> float:
        """Return what is kept for the backward pass when the forward pass ends."""
        model, width = self._config.model, self._config.model.hidden * self._a
        blocks = [self._block(layer, self._tokens) for layer in range(model.layers)]
        if self._config.recompute:
            # inputs of all blocks, and everything of the one that is computed again
            return (len(blocks) + 2) * self._tokens * width + max(blocks)
        return sum(blocks) + 2 * self._tokens * width  # embedding's and the final norm's outputs

    def received(self) -> float:
        """Return the rows of other ranks among what is kept."""
        if self._config.parallel.expert_ranks == 1:
            return 0.0
        layers = 1 if self._config.recompute else len(self._config.model.moe_layers())
        return layers * self._rows(self._tokens) * self._row_bytes()

    def beside(self) -> float:
        """Return what the backward pass of the fullest block needs at once."""
        model = self._config.model
        inner = self._inner()
        if not model.moe_layers():
            return self._tokens * self._a * (2 * model.hidden + 3 * inner * self._dense_width())
        # gradients of the output rows, of both products, and the inner activations once more
        rows = self._rows(self._tokens)
        part = model.expert_width // self._config.parallel.expert_shard
        per_row = 3 * model.hidden + (inner + 2) * part
        return self._a * (rows * per_row + 2 * self._tokens * model.hidden)

    def logits(self) -> float:
        """Return the logits in the loss's own backward pass: softmax, and two gradients."""
        return self._tokens * self._vocab * (3 * _WIDE + (self._a if self._a < _WIDE else 0))

    def evaluation(self) -> float:
        """Return what a pass of the evaluation needs; it is filled up to its size.

        The logits are larger than the holes that the layers leave, so both count.
        """
        config, model = self._config, self._config.model
        tokens = config.evaluation.micro * config.data.sequence_length // config.parallel.tensor
        logits = tokens * self._vocab * (2 * _WIDE + (self._a if self._a < _WIDE else 0))
        if model.moe_layers():
            rows = self._rows(tokens) * (self._row_bytes() + model.hidden * self._a)
        else:
            rows = tokens * self._a * (self._inner() + 1) * self._dense_width()
        return logits + rows + 3 * tokens * model.hidden * self._a

    def _inner(self) -> int:
        return 2 if self._config.model.activation is Activation.swiglu else 1

    def _dense_width(self) -> int:
        return self._config.model.feed_forward_width()

    def _rows(self, tokens: int) -> float:
        """Return R: pairs of this rank's tokens on average, times the imbalance."""
        return tokens * self._most_k * self._load * self._config.parallel.expert_shard

    def _row_bytes(self) -> float:
        """Return what the experts keep of a row: its input and the first product."""
        model = self._config.model
        part = model.expert_width // self._config.parallel.expert_shard
        return self._a * (model.hidden + self._inner() * part)

    def _block(self, layer: int, tokens: int) -> float:
        """Return what autograd keeps of one block."""
        model, a = self._config.model, self._a
        head = model.hidden // model.heads
        kv = head * (model.kv_heads or model.heads)
        cast = _WIDE if a < _WIDE else 0  # norms keep a copy in fp32
        attention = (2 * (model.hidden + kv) + model.hidden + model.hidden) * a  # of all positions
        attention += (model.hidden + kv) * (cast or a) if model.qk_norm else 0
        # both norms' inputs and outputs, and the block's input; heads are split over ranks
        per_token: float = 4 * model.hidden * a + 2 * model.hidden * cast + attention
        if not model.is_moe(layer):
            return tokens * (per_token + self._ffn(self._dense_width()))
        shared = model.shared_experts * model.expert_width
        per_token += self._ffn(shared) if shared else 0
        per_token += 6 * model.num_experts * _WIDE  # logits, scores and what is made of them
        per_token += self._config.model.hidden * cast  # the router's input
        pairs = tokens * self._most_k
        kept = self._rows(tokens) * self._row_bytes() + pairs * model.hidden * a
        return tokens * per_token + kept + pairs * 40  # places of pairs: five whole numbers

    def _ffn(self, width: int) -> float:
        """Return what a dense network keeps of a token: both products and what is between."""
        return self._a * width * (self._inner() * 2 if self._inner() == 2 else 2)


def _local_parameters(
    config: TrainConfig, vocab_size: int, number_bytes: int
) -> list[ParameterSpec]:
    """Return this rank's parameters, without memory."""
    parallel = config.parallel
    with torch.device("meta"):
        model = Decoder(config.model, config.router, vocab_size)
    alone = _sized(1)
    experts = ExpertGroups(
        rows=_sized(parallel.expert),
        shard=_sized(parallel.expert_shard),
        everyone=_sized(parallel.expert_ranks),
        local=alone,
        across=alone,
    )
    apply_expert_parallel(model, experts)
    apply_tensor_parallel(model, _sized(parallel.tensor))
    kinds = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    set_precision(model, kinds[number_bytes])
    return parameter_specs(model)


def _sized(size: int) -> Group:
    """Return a group of which only the size is asked."""
    return NO_GROUP if size == 1 else Group(None, 0, size, Traffic())


def _share(spec: ParameterSpec, parallel: ParallelConfig) -> int:
    """Return over how many ranks the optimizer state of a parameter is spread."""
    if spec.owner == "expert":
        return max(1, parallel.shard // parallel.expert_ranks)
    if spec.owner == "tensor":
        return max(1, parallel.shard // parallel.tensor)
    return parallel.shard


def _largest_gradient(specs: Iterable[ParameterSpec], number_bytes: int) -> float:
    """Return the gradient that autograd holds before its bucket takes it; experts' skip that."""
    dense = [spec.parameter.numel() for spec in specs if spec.owner != "expert"]
    return max(dense) * number_bytes
