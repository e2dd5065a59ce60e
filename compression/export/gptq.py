"""GPTQ checkpoints, version 1 (zero points are stored less one) and version 2 (as they are).

    qweight  int32 (K * bits / 32, N)   codes of a column of 32 / bits rows in a word
    qzeros   int32 (G, N * bits / 32)   zero points likewise
    scales   fp16 (G, N)
    g_idx    int32 (K,)                 group of each input

Three-bit codes are one stream of bits: 32 codes in three words. Widths other than the most common
one are named module by module (`dynamic`).

Shapes:  N rows (outputs)   K columns (inputs)   G groups of a row
"""

import re
from collections import Counter
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

__all__ = ["Gptq"]


class Gptq:
    """GPTQ of one version.

    Args:
        version: 1 or 2.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = "gptq" if version == 1 else "gptq_v2"

    def check(self, plan: Plan) -> None:
        """Raise `ConfigError` for float zeros, or sizes that do not fill whole words."""
        check_integer_zeros(plan, self.name)
        for part in plan.parts:
            bits = container_bits(part.shape.bits)
            for what, size in (("columns", part.shape.columns), ("rows", part.shape.rows)):
                if size * bits % 32:
                    raise ConfigError(
                        f"format is {self.name}, which fills whole 32-bit words, but {size} {what} "
                        f"of '{part.name}' at {bits} bits do not; export format=hf"
                    )

    def tensors(self, place: Place, matrix: Quantized) -> dict[str, Tensor]:
        """Return the four tensors of a linear module.

        Raises:
            ConfigError: for a zero point that version 1 cannot hold, or rows that do not fill
                whole words.
        """
        found = as_integers(matrix, place.rows)
        columns = found.code_NK.shape[1]
        if found.code_NK.shape[0] * found.bits % 32:
            raise ConfigError(
                f"format is {self.name}, which fills whole 32-bit words, but the "
                f"{found.code_NK.shape[0]} outputs of {place.module} at {found.bits} bits do not; "
                "export format=hf"
            )
        stored_NG = found.zero_NG
        if self.version == 1:
            below = int((found.zero_NG == 0).sum())
            if below:
                raise ConfigError(
                    f"format is gptq, which stores zero points less one, but {below} of "
                    f"{place.module} are 0; export format=gptq_v2"
                )
            stored_NG = found.zero_NG - 1
        return {
            f"{place.module}.qweight": pack_words(found.code_NK, found.bits).t().contiguous(),
            f"{place.module}.qzeros": pack_words(stored_NG.t().contiguous(), found.bits),
            f"{place.module}.scales": found.scale_NG.t().contiguous(),
            f"{place.module}.g_idx": (torch.arange(columns) // found.group).int(),
        }

    def settings(
        self, modules: Mapping[str, MatrixFormat], plain: Sequence[str]
    ) -> dict[str, Any] | None:
        """Return `quantization_config`."""
        widths = {name: container_bits(shape.bits) for name, shape in modules.items()}
        common = Counter(widths.values()).most_common(1)[0][0]
        dynamic: dict[str, dict[str, int]] = {
            f"+:^{re.escape(name)}$": {"bits": bits}
            for name, bits in widths.items()
            if bits != common
        }
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in plain if name != "lm_head"}
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "bits": common,
            "group_size": next(iter(modules.values())).group,
            "desc_act": False,
            "sym": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "dynamic": dynamic,
        }
