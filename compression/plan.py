"""Which matrices of a model are quantised, how wide each, and what the artefact will take.

A `Part` is one matrix: an expert's first weight (gate and up rows together) or second weight, a
matrix of attention, of a shared expert or of a dense layer. Everything else is kept: routers with
their state and norms in fp32, the embedding and the output weights as the settings say.

All sizes follow from the plan alone, headers included; the writer is held to them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from gatewise.compression.config import CompressConfig, Kept
from gatewise.compression.formats import MatrixFormat, ZeroPoint, row_bytes
from gatewise.moe.attention import Attention
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.training.checkpoint_format import dtype_name, parse_dtype
from gatewise.training.state import model_ranges

__all__ = ["Entry", "KeptTensor", "Part", "Plan", "file_entries", "file_name", "list_parts"]

PLAN_FORMAT = 1
Kind = Literal["expert", "shared", "dense", "attention"]
_BLOCK = re.compile(r"(?:[^/]+/)?blocks\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix; `shape.bits` is 0 as long as nothing is planned."""

    name: str  # its tensors in the artefact are <name>.codes, .scale and .zero
    source: str  # parameter that it is, or is a slice of
    layer: int
    kind: Kind
    expert: int | None  # index of the slice
    projection: Literal["in", "out", "qkv"]
    shape: MatrixFormat


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A tensor that is not quantised, by its name in training checkpoints."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an artefact's file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        size = self.dtype.itemsize
        for width in self.shape:
            size *= width
        return size


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole model: every parameter is in exactly one part (or slice) or kept."""

    layers: int
    parts: tuple[Part, ...]
    kept: tuple[KeptTensor, ...]

    def with_bits(self, bits: Mapping[str, float]) -> "Plan":
        """Return the plan with the widths of some parts, by name, set."""
        parts = (
            replace(part, shape=replace(part.shape, bits=bits[part.name]))
            if part.name in bits
            else part
            for part in self.parts
        )
        return replace(self, parts=tuple(parts))

    def of_layer(self, layer: int, kind: Kind | None = None) -> list[Part]:
        """Return the parts of a layer, of one kind or all."""
        return [part for part in self.parts if part.layer == layer and kind in (None, part.kind)]

    def kept_of_file(self, number: int) -> list[KeptTensor]:
        """Return the kept tensors of a file; 0 holds those outside of the blocks."""
        found = []
        for item in self.kept:
            match = _BLOCK.match(item.name)
            if number == (int(match[1]) + 1 if match else 0):
                found.append(item)
        return found

    def payload_bytes(self) -> int:
        """Return the bytes of all tensors."""
        files = (file_entries(self, number) for number in range(self.layers + 1))
        return sum(entry.bytes for entries in files for entry in entries)

    def to_json(self) -> str:
        """Return the plan as text; `from_json` gives an equal one back."""
        parts = []
        for part in self.parts:
            record = asdict(part)
            record["shape"]["zero"] = part.shape.zero.name
            parts.append(record)
        kept = [
            {"name": item.name, "shape": list(item.shape), "dtype": dtype_name(item.dtype)}
            for item in self.kept
        ]
        record = {"format": PLAN_FORMAT, "layers": self.layers, "parts": parts, "kept": kept}
        return json.dumps(record, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes, *, source: str) -> "Plan":
        """Read a plan.

        Raises:
            CheckpointError: if the text is not one; `source` names it.
        """
        try:
            record: dict[str, Any] = json.loads(text)
            if record["format"] != PLAN_FORMAT:
                raise CheckpointError(
                    f"{source} has format {record['format']}; this version reads {PLAN_FORMAT}"
                )
            parts = []
            for item in record["parts"]:
                shape = item.pop("shape")
                zero = ZeroPoint[shape.pop("zero")]
                parts.append(Part(**item, shape=MatrixFormat(**shape, zero=zero)))
            kept = [
                KeptTensor(item["name"], tuple(item["shape"]), parse_dtype(item["dtype"]))
                for item in record["kept"]
            ]
            return Plan(record["layers"], tuple(parts), tuple(kept))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{source} is damaged: it is not a plan") from error


def list_parts(model: Decoder, config: CompressConfig) -> Plan:
    """List what of a model is quantised; experts have no widths yet.

    Args:
        model: on any device, the meta device too.
        config: widths of everything but experts, group, zeros, and how the rest is kept.
    """
    if model.config.clamped_experts:
        raise ConfigError(
            "model.clamped_experts is true; experts with biases are not quantised, compress a "
            "model without"
        )
    fixed: dict[Kind, float] = {
        "attention": config.attention_bits,
        "shared": config.shared_bits,
        "dense": config.dense_bits,
        "expert": 0.0,
    }
    parts: list[Part] = []
    for module_name, module in model.named_modules():
        match = _BLOCK.match(module_name)
        if match is None:
            continue
        layer = int(match[1])
        if isinstance(module, GroupedExperts):
            parts += _expert_parts(module, module_name, layer, config)
        elif isinstance(module, FeedForward):
            shared = isinstance(model.get_submodule(module_name.rpartition(".")[0]), MoELayer)
            kind: Kind = "shared" if shared else "dense"
            shapes = (("in", "w_in_GD"), ("out", "w_out_DF"))
            parts += _matrices(module, module_name, layer, kind, shapes, fixed[kind], config)
        elif isinstance(module, Attention):
            shapes = (("qkv", "w_qkv"), ("out", "w_out"))
            bits = fixed["attention"]
            parts += _matrices(module, module_name, layer, "attention", shapes, bits, config)
    quantised = {part.source for part in parts}
    narrow = torch.bfloat16 if config.kept is Kept.bf16 else torch.float32
    wide_matrices = {"model/embedding": narrow, "model/head": narrow}
    kept = []
    for name, part_range in sorted(model_ranges(model).items()):
        parameter = name.partition("/")[2]
        if name.startswith("model/") and parameter in quantised:
            continue
        is_matrix = _is_unquantised_matrix(model, name)
        dtype = torch.bfloat16 if is_matrix else wide_matrices.get(name, torch.float32)
        kept.append(KeptTensor(name, part_range.shape, dtype))
    return Plan(model.config.layers, tuple(parts), tuple(kept))


def file_name(number: int) -> str:
    """Return the name of a file: 0 is what stands outside of the blocks, l + 1 is block l."""
    return f"model-{number:05d}.safetensors"


def file_entries(plan: Plan, number: int) -> list[Entry]:
    """Return the tensors of a file in the order of their bytes."""
    entries = []
    for part in plan.of_layer(number - 1) if number else ():
        shape = part.shape
        codes = (shape.rows, row_bytes(shape.bits, shape.columns))
        grid = (shape.rows, shape.groups)
        entries.append(Entry(f"{part.name}.codes", torch.uint8, codes))
        entries.append(Entry(f"{part.name}.scale", torch.float16, grid))
        if shape.has_zero:
            kind = torch.float16 if shape.zero is ZeroPoint.float else torch.uint8
            entries.append(Entry(f"{part.name}.zero", kind, grid))
    entries += [Entry(item.name, item.dtype, item.shape) for item in plan.kept_of_file(number)]
    # wide types first, so that every tensor starts at a multiple of its type's size
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def _expert_parts(
    module: GroupedExperts, name: str, layer: int, config: CompressConfig
) -> list[Part]:
    parts: list[Part] = []
    for expert in range(module.num_local):
        for projection, attribute, weight in (
            ("in", "w_in_eGD", module.w_in_eGD),
            ("out", "w_out_eDF", module.w_out_eDF),
        ):
            shape = _shape(tuple(weight.shape[1:]), 0.0, config)
            short = f"{name}.{expert}.w_{projection}"
            source = f"{name}.{attribute}"
            parts.append(
                Part(short, source, layer, "expert", expert, projection, shape)  # type: ignore[arg-type]  # a literal
            )
    return parts


def _matrices(  # noqa: PLR0917 - the fields of a part
    module: torch.nn.Module,
    name: str,
    layer: int,
    kind: Kind,
    shapes: Sequence[tuple[str, str]],
    bits: float,
    config: CompressConfig,
) -> list[Part]:
    if bits == 16:
        return []
    parts = []
    for projection, attribute in shapes:
        rows_columns = tuple(getattr(module, attribute).shape)
        full = f"{name}.{attribute}"
        shape = _shape(rows_columns, bits, config)
        parts.append(Part(full, full, layer, kind, None, projection, shape))  # type: ignore[arg-type]  # a literal
    return parts


def _shape(shape: tuple[int, ...], bits: float, config: CompressConfig) -> MatrixFormat:
    rows, columns = shape
    return MatrixFormat(rows, columns, bits, config.grid.group, config.grid.zero)


def _is_unquantised_matrix(model: Decoder, name: str) -> bool:
    """Tell whether a tensor is a matrix that the settings keep at 16 bits."""
    kind, _, parameter = name.partition("/")
    owner = parameter.rpartition(".")[0]
    if kind != "model" or not owner:
        return False
    return isinstance(model.get_submodule(owner), Attention | FeedForward)
