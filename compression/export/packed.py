"""compressed-tensors, format pack-quantized.

    weight_packed      int32 (N, ceil(K * bits / 32))   codes as one stream of bits
    weight_scale       fp16 (N, G)
    weight_zero_point  int32 (ceil(N * bits / 32), G)   zero points, packed down the rows
    weight_shape       int64 (2,)

The codes stand for signed numbers, shifted by 2^(bits - 1); so do the zero points, and the shift
falls out of their difference. What serves these files fuses the experts of a layer into one tensor,
so a plan must give all of them one width.

Shapes:  N rows   K columns   G groups of a row
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gatewise.compression.export.integers import (
    as_integers,
    check_integer_zeros,
    container_bits,
    pack_words,
)
from gatewise.compression.export.layout import Place
from gatewise.compression.formats import MatrixFormat
from gatewise.compression.plan import Plan
from gatewise.compression.quantize import Quantized
from gatewise.parallel.errors import ConfigError

__all__ = ["PackQuantized"]


class PackQuantized:
    """The format."""

    name = "compressed_tensors"

    def check(self, plan: Plan) -> None:
        """Raise `ConfigError` for mixed widths in a layer, float zeros or ragged groups."""
        check_integer_zeros(plan, self.name)
        for layer in range(plan.layers):
            widths = sorted(
                {container_bits(part.shape.bits) for part in plan.of_layer(layer, "expert")}
            )
            if len(widths) > 1:
                raise ConfigError(
                    f"format is {self.name}, which has one width for all experts of a layer, but "
                    f"layer {layer} has {', '.join(map(str, widths))} bits; compress with "
                    "granularity=layer, or export format=gptq or hf"
                )
        for part in plan.parts:
            if part.shape.columns % part.shape.group:
                raise ConfigError(
                    f"format is {self.name}, whose groups are all of one size, but the "
                    f"{part.shape.columns} columns of '{part.name}' are no multiple of grid.group "
                    f"({part.shape.group}); export format=gptq or hf"
                )

    def tensors(self, place: Place, matrix: Quantized) -> dict[str, Tensor]:
        """Return the four tensors of a linear module."""
        found = as_integers(matrix, place.rows)
        zero_GN = pack_words(found.zero_NG.t().contiguous(), found.bits)
        return {
            f"{place.module}.weight_packed": pack_words(found.code_NK, found.bits),
            f"{place.module}.weight_scale": found.scale_NG.contiguous(),
            f"{place.module}.weight_zero_point": zero_GN.t().contiguous(),
            f"{place.module}.weight_shape": torch.tensor(found.code_NK.shape),
        }

    def settings(
        self, modules: Mapping[str, MatrixFormat], plain: Sequence[str]
    ) -> dict[str, Any] | None:
        """Return `quantization_config`."""
        by_width: dict[int, list[str]] = defaultdict(list)
        for name, shape in modules.items():
            by_width[container_bits(shape.bits)].append(name)
        group = next(iter(modules.values())).group
        groups = {
            f"group_{index}": {
                "targets": [f"re:^{re.escape(name)}$" for name in by_width[bits]],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for index, bits in enumerate(sorted(by_width))
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(plain),
        }
