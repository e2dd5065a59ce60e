"""DeepSpeed's ZeRO as the engine of a step: it reduces and splits, the step decides.

DeepSpeed flattens the parameters of each of its groups and cuts them into one partition per rank;
a rank keeps master weights and moments of its partition only, and with stage 2 gradients as well.
Experts are in groups of their own, which are split over the ranks that hold the same experts. It
divides every gradient by the number of all ranks, experts' too, which is our rule for gradients.

What it would do beyond that is left out: norms, clipping and skipped steps come from the step,
through the scale and skip that torch's fused AdamW takes, and checkpoints are ours: DeepSpeed's
know experts by the names of its own layers and lose those of others.

Source: ZeRO: arXiv:1910.02054; written against DeepSpeed 0.19.8.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatewise.moe.model import Decoder, parameter_specs
from gatewise.parallel.buckets import OwnedGradient
from gatewise.parallel.parameters import Label, ParameterSpec, Part, owned_parts
from gatewise.parallel.runtime import Runtime, return_freed_memory
from gatewise.parallel.squares import square_sums
from gatewise.training.config import TrainConfig
from gatewise.training.engine import expert_layers
from gatewise.training.fused import choose_fused, use_norms
from gatewise.training.health import expert_squares
from gatewise.training.optim import Held, learning_rate_ratio

__all__ = ["ZeroEngine"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Parameters that DeepSpeed keeps in one group."""

    label: Label
    ratio: float
    specs: Sequence[ParameterSpec]


@dataclass(frozen=True, slots=True)
class _Partition:
    """This rank's part of one of DeepSpeed's groups."""

    label: Label
    ratio: float  # of the learning rate
    parts: Sequence[Part]
    master: Tensor
    state: dict[str, Tensor]  # as torch's AdamW keeps it


class ZeroEngine:
    """Trains through DeepSpeed.

    Args:
        model: placed and initialised; DeepSpeed moves its parameters into flat tensors.
        config: of the run; `deepspeed` says how much is split.
        runtime: this rank, one of several.
    """

    divisor = 1.0  # DeepSpeed divides

    def __init__(self, model: Decoder, config: TrainConfig, runtime: Runtime) -> None:
        specs = parameter_specs(model)
        self._layers = expert_layers(specs)
        self._offload = config.deepspeed.offload
        use_norms(model, choose_fused(runtime.device).norm)
        expert_ranks = config.parallel.expert_ranks
        groups, kinds = _group(specs, config, expert_ranks)
        self._inner = torch.optim.AdamW(
            groups,
            lr=config.optim.lr,
            betas=(config.optim.beta1, config.optim.beta2),
            eps=config.optim.eps,
            fused=True,  # the kernel of our own engine, and the only one that takes scale and skip
        )
        self._engine = _initialize(model, self._inner, config, expert_ranks)
        self._zero = self._engine.optimizer
        if not self._offload:
            _share_masters(self._zero)
        return_freed_memory()  # of the parameters' moves into DeepSpeed's flat tensors
        self._fresh = True  # no backward pass since the last step
        self._partitions = [self._describe(index, kind) for index, kind in enumerate(kinds)]
        size = sum(
            sum(t.nbytes for t in p.state.values())
            + (p.master.nbytes if self._offload or p.master.dtype != flat.dtype else 0)
            for p, flat in zip(self._partitions, self._zero.bit16_groups_flat, strict=True)
        )
        _log.info(
            "DeepSpeed ZeRO %d%s: %.1f MB of moments and copies of weights on this rank",
            config.deepspeed.stage,
            " with offload" if self._offload else "",
            size / 1e6,
        )

    @property
    def updates(self) -> int:
        """Number of updates applied (skipped steps do not count); the host waits for it."""
        return int(self._partitions[0].state["step"].item())

    @updates.setter
    def updates(self, count: int) -> None:
        for partition in self._partitions:
            partition.state["step"].fill_(float(count))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Let DeepSpeed collect the gradients, and reduce them where its stage says so."""
        if self._fresh and self._offload:
            for (values,) in self._reduced():  # kept between steps; no gradient counts as zero
                values.zero_()
        self._fresh = False
        self._engine.set_gradient_accumulation_boundary(last)
        # its forward pass watches the loss, so that it knows when the backward pass begins
        self._engine.backward(self._engine(loss), scale_wrt_gas=False)

    def finish(self) -> None:
        """Nothing is under way after the last backward pass."""

    def squares(self) -> dict[str, Tensor]:
        """Return sums of squares per label; every element is in one rank's partition."""
        squares: dict[str, Tensor] = {}
        for partition, gradients in zip(self._partitions, self._reduced(), strict=True):
            for values in gradients:
                square = square_sums(values.float().reshape(1, -1))[0]
                label = partition.label
                squares[label] = squares[label] + square if label in squares else square
        return squares

    def expert_squares(self, num_experts: int) -> Tensor:
        """Return sums of squares per layer and expert."""
        owned = [
            OwnedGradient(part, part.of(flat), 1)
            for partition, gradients in zip(self._partitions, self._reduced(), strict=True)
            if partition.label == "expert"
            for flat in (torch.cat([values.flatten() for values in gradients]).float(),)
            for part in partition.parts
        ]
        return expert_squares(owned, self._layers, num_experts)

    def step(self, lr: float, *, scale: Tensor, skip: Tensor) -> None:
        """Update this rank's partitions and gather the others'."""
        for group, partition in zip(self._inner.param_groups, self._partitions, strict=True):
            group["lr"] = lr * partition.ratio
        # the attributes by which torch's own gradient scaler talks to fused optimizers
        inner: Any = self._inner
        inner.grad_scale, inner.found_inf = scale, skip
        self._engine.step()
        self._fresh = True

    def place_slices(self, model: Decoder, window_bytes: float) -> None:
        """Send nothing inside backward passes: settings that plan it are refused."""

    def held(self) -> list[Held]:
        """Return what this rank updates."""
        return [
            Held(p.parts, p.master, p.state["exp_avg"], p.state["exp_avg_sq"])
            for p in self._partitions
            if p.parts  # a small group leaves some ranks with padding alone
        ]

    def publish(self) -> None:
        """Copy master weights into the parameters of all ranks."""
        self._zero.update_lp_params()

    def _reduced(self) -> list[list[Tensor]]:
        """Return, for each group, the reduced gradients that lie in this rank's partition."""
        if self._offload:
            return [[flat.grad] for flat in self._zero.single_partition_of_fp32_groups]
        return [self._zero.averaged_gradients[i] for i in range(len(self._partitions))]

    def _describe(self, index: int, kind: _Kind) -> _Partition:
        """Find what lies in this rank's partition of one group, and make its moments.

        Made now, so that a checkpoint can be loaded into them.
        """
        zero = self._zero
        flat = zero.single_partition_of_fp32_groups[index]
        place, placed = 0, []
        spec_of = {id(spec.parameter): spec for spec in kind.specs}
        for parameter in zero.bit16_groups[index]:
            placed.append((place, spec_of[id(parameter)]))
            place += parameter.numel()
        start = dist.get_rank(zero.real_dp_process_group[index]) * flat.numel()
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
        }
        self._inner.state[flat] = state
        parts = owned_parts(placed, slice(start, start + flat.numel()))
        return _Partition(kind.label, kind.ratio, parts, flat.detach(), state)


def _share_masters(zero: Any) -> None:
    """Let master weights of the parameters' own type be the parameters, not copies of them."""
    groups = zip(
        zero.single_partition_of_fp32_groups,
        zero.parallel_partitioned_bit16_groups,
        zero.real_dp_process_group,
        strict=True,
    )
    for master, partitions, group in groups:
        mine = partitions[dist.get_rank(group)]
        if mine.dtype == master.dtype:
            master.data = mine.data


def _group(
    specs: Sequence[ParameterSpec], config: TrainConfig, expert_ranks: int
) -> tuple[list[dict[str, Any]], list[_Kind]]:
    """Return the optimizer's groups as DeepSpeed wants them, and what is in them.

    Experts that are spread over ranks are marked, as DeepSpeed asks: it sums their gradients over
    the ranks that hold the same ones.
    """
    kinds: dict[tuple[Any, ...], list[ParameterSpec]] = {}
    for spec in reversed(specs):  # about the order in which the backward pass finishes them
        kinds.setdefault((spec.label, spec.decay, spec.parameter.dtype), []).append(spec)
    groups: list[dict[str, Any]] = []
    found: list[_Kind] = []
    # DeepSpeed takes the type of its buffers from the first group: the widest
    ordered = sorted(kinds.items(), key=lambda item: -item[0][2].itemsize)
    for (label, decay, _), members in ordered:
        group: dict[str, Any] = {
            "params": [spec.parameter for spec in members],
            "weight_decay": config.optim.weight_decay if decay else 0.0,
            "name": f"{label}_{len(groups)}",
        }
        if label == "expert" and expert_ranks > 1:
            name = group["name"] = f"ep_size_{expert_ranks}"
            group["moe"] = True
            for spec in members:
                spec.parameter.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed's marks
                spec.parameter.group_name = name  # type: ignore[attr-defined]
        groups.append(group)
        found.append(_Kind(label, learning_rate_ratio(config.optim, label), members))
    return groups, found


def _initialize(
    model: Decoder, optimizer: torch.optim.Optimizer, config: TrainConfig, expert_ranks: int
) -> Any:  # Any: DeepSpeed ships no types
    """Let DeepSpeed take over the parameters."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    settings = config.deepspeed
    zero: dict[str, Any] = {
        "stage": settings.stage,
        "reduce_bucket_size": int(settings.bucket_mb * 2**18),  # numbers of 4 bytes
        "allgather_bucket_size": int(settings.bucket_mb * 2**18),
        "overlap_comm": False,
        # norms are the step's; with offload DeepSpeed insists on its own, which changes nothing
        "compute_grad_norm": settings.offload,
    }
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    engine, *_ = deepspeed.initialize(
        model=_watched(model, expert_ranks if model.moe_layers() else 1),
        optimizer=optimizer,
        dist_init_required=False,
        config={
            # counts of its own samples: the step reads the data, and says when it is the last pass
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 10**9,
        },
    )
    return engine


def _watched(model: Decoder, expert_ranks: int) -> nn.Module:
    """Wrap the model for DeepSpeed, which finds experts by a class of its own only."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class SpreadExperts(MoE):  # type: ignore[misc]  # no types
        """Stands for the experts of all layers; holds nothing."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = model.config.num_experts
            self.num_local_experts = model.config.num_experts // expert_ranks
            self.ep_size = expert_ranks
            self.expert_group_name = f"ep_size_{expert_ranks}"

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Make the groups: experts spread over consecutive ranks, as ours are."""
            if self.expert_group_name not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(self.ep_size)

    class Watched(nn.Module):
        """Hands the loss through, so that DeepSpeed sees when the backward pass begins."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.experts = SpreadExperts() if expert_ranks > 1 else nn.Identity()

        def forward(self, loss: Tensor) -> Tensor:
            return loss.view_as(loss)

    return Watched()
