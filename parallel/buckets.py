"""Flat buckets: parameters of one kind side by side in one tensor, and their gradients in another.

A bucket holds parameters of one label, one dtype and one decay setting, in the order in which the
backward pass finishes them. Parameters become views of `values`; gradients are collected in fp32 in
`gradients`. With sharded optimizer state each rank of the shard group owns one slice of both.

Read first: `parameters.py`. Then `reducer.py` (sums gradients), `training/optim.py` (updates).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gatewise.parallel.dims import Groups, ReduceGroups
from gatewise.parallel.parameters import Label, Owner, ParameterSpec, Part, owned_parts

__all__ = ["Bucket", "OwnedGradient", "Slot", "make_buckets"]

BUCKET_BYTES = 16 * 2**20  # of gradients; large enough that latency does not count


@dataclass(slots=True)
class Slot:
    """One parameter's place in its bucket."""

    spec: ParameterSpec
    offset: int
    gradient: Tensor  # fp32 view of the parameter's shape
    fresh: bool = True  # nothing written since the last optimizer step

    @property
    def end(self) -> int:
        """Where the next parameter starts."""
        return self.offset + self.spec.parameter.numel()

    def add(self, gradient: Tensor) -> None:
        """Add a gradient; the first one since the last step overwrites."""
        if self.fresh:
            self.gradient.copy_(gradient)
            self.fresh = False
        else:
            self.gradient.add_(gradient)


@dataclass(frozen=True, slots=True)
class OwnedGradient:
    """The reduced gradient of a part of a parameter that this rank owns."""

    part: Part
    values: Tensor  # flat
    replicas: int  # ranks that own the same


@dataclass(slots=True)
class Bucket:
    """Parameters that are reduced and updated together."""

    label: Label
    decay: bool
    groups: ReduceGroups
    values: Tensor  # flat, dtype of the parameters
    gradients: Tensor  # flat, fp32 (fp64 for fp64 parameters)
    slots: list[Slot] = field(default_factory=list)

    @property
    def owned(self) -> slice:
        """The range whose optimizer state this rank keeps."""
        size = self.values.numel() // self.groups.shard.size
        return slice(self.groups.shard.rank * size, (self.groups.shard.rank + 1) * size)

    def parts(self) -> list[Part]:
        """Return what lies in the owned range."""
        return owned_parts(((slot.offset, slot.spec) for slot in self.slots), self.owned)

    def owned_gradients(self) -> list[OwnedGradient]:
        """Return the gradients in the owned range."""
        mine, replicas = self.gradients[self.owned], self.groups.replicate.size
        return [OwnedGradient(part, part.of(mine), replicas) for part in self.parts()]


def make_buckets(
    specs: Sequence[ParameterSpec], groups: Groups, *, bucket_bytes: int = BUCKET_BYTES
) -> list[Bucket]:
    """Move parameters and their gradients into flat buckets.

    Args:
        specs: in the order of the forward pass; buckets are in the reverse order.
        groups: who reduces what.
        bucket_bytes: a bucket is closed when its gradients reach this size.
    """
    open_kinds: dict[tuple[Label, bool, torch.dtype, Owner], list[ParameterSpec]] = {}
    closed: list[list[ParameterSpec]] = []
    for spec in reversed(specs):
        kind = (spec.label, spec.decay, spec.parameter.dtype, spec.owner)
        members = open_kinds.setdefault(kind, [])
        members.append(spec)
        if 4 * sum(member.parameter.numel() for member in members) >= bucket_bytes:
            closed.append(open_kinds.pop(kind))
    closed += open_kinds.values()
    # whoever finishes last in the backward pass decides when a bucket can be sent
    place = {spec.name: index for index, spec in enumerate(specs)}
    closed.sort(key=lambda members: -min(place[member.name] for member in members))
    return [_build(members, groups) for members in closed]


def _build(members: list[ParameterSpec], groups: Groups) -> Bucket:
    first = members[0]
    reduce_groups = groups.reduced_by(first.owner)
    total = sum(member.parameter.numel() for member in members)
    size = reduce_groups.shard.size
    padded = (total + size - 1) // size * size
    values = first.parameter.new_zeros(padded, requires_grad=False)
    wide = torch.promote_types(values.dtype, torch.float32)
    gradients = torch.zeros(padded, dtype=wide, device=values.device)
    bucket = Bucket(first.label, first.decay, reduce_groups, values.detach(), gradients)
    offset = 0
    for spec in members:
        end = offset + spec.parameter.numel()
        place = bucket.values[offset:end].view_as(spec.parameter)
        place.copy_(spec.parameter.detach())
        spec.parameter.data = place
        gradient = gradients[offset:end].view_as(spec.parameter)
        bucket.slots.append(Slot(spec, offset, gradient))
        offset = end
    return bucket
