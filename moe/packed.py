"""Modules that compute with packed low-bit weights; they take the place of parameters.

Few rows, as in decoding, are multiplied with the codes themselves, and are quantised to int8 for
that. For many rows a matrix is dequantised once into scratch memory and multiplied as any other,
which rounds no activation. There are no gradients.

Read first: `ops/packed.py`.

Shapes:  T tokens   K experts per token   R rows   E experts   D model width   F expert width
         G = 2F with a gate (gate rows first), else F
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.moe.config import Activation
from gatewise.moe.dispatch import AllToAllDispatcher, Piece
from gatewise.moe.ops.grouped_ffn import ffn_forward
from gatewise.moe.ops.native_packed import PackedTable
from gatewise.moe.ops.packed import (
    check_choices,
    check_rows,
    check_tables,
    packed_ffn,
    packed_linear,
    unpack_weight,
)
from gatewise.moe.ops.panels import PackedWeight
from gatewise.moe.ops.permute import combine_rows, gather_rows, sort_pairs
from gatewise.parallel.streams import used_here

__all__ = ["PackedExperts", "PackedLinear", "multiply"]

_MOST_ROWS = 8  # of one matrix that are multiplied with the codes themselves


class PackedLinear(nn.Module):
    """A matrix that multiplies rows, in the place of a parameter.

    Args:
        weight: the matrix.
    """

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return self.weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T for rows of any leading shape."""
        _refuse_gradients(x)
        x_RD = x.reshape(-1, x.shape[-1])
        if x_RD.shape[0] <= _MOST_ROWS:
            y_RG = packed_linear(x_RD, self.weight)
        else:
            check_rows(x_RD, self.weight)
            shape = (self.weight.rows, self.weight.columns)
            y_RG = F.linear(x_RD, unpack_weight(self.weight, x_RD.new_empty(shape)))
        return y_RG.view(*x.shape[:-1], self.weight.rows)


def multiply(x: Tensor, weight: Tensor | PackedLinear) -> Tensor:
    """Return x W^T, whatever kind of weight it is."""
    if isinstance(weight, PackedLinear):
        return weight(x)  # type: ignore[no-any-return]  # a module
    return F.linear(x, weight)


class PackedExperts(nn.Module):
    """Experts of a layer; widths may differ between experts and between their two matrices.

    `dispatcher`, where set, spreads the layer's experts over ranks: those here are this rank's.

    Args:
        w_in: first matrices, (G, D) each.
        w_out: second matrices, (D, F) each.
        activation: the non-linearity; swiglu has a gate.

    Raises:
        ValueError: if matrices that stand side by side differ in shape or group, or the two kinds
            do not fit together.
    """

    def __init__(
        self, w_in: Sequence[PackedWeight], w_out: Sequence[PackedWeight], activation: Activation
    ) -> None:
        super().__init__()
        self.w_in, self.w_out = _table("w_in", w_in), _table("w_out", w_out)
        check_tables(self.w_in, self.w_out, activation)
        self.activation = activation
        self.dispatcher: AllToAllDispatcher | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(weight.nbytes for weight in (*self.w_in.weights, *self.w_out.weights))

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Sum the outputs of each token's experts with its weights; -1 is no expert.

        Raises:
            ValueError: as `check_choices`, or where gradients are wanted.
        """
        _refuse_gradients(x_TD)
        if self.dispatcher is not None:
            return self._spread(x_TD, expert_TK, weight_TK, self.dispatcher)
        if x_TD.shape[0] <= _MOST_ROWS:  # then no expert has more rows
            return self._few_rows(x_TD, expert_TK, weight_TK)
        self._check(x_TD, expert_TK, weight_TK, len(self.w_in.weights))
        _, token_M, inverse_TK, count_E = sort_pairs(expert_TK, len(self.w_in.weights))
        counts = count_E.tolist()
        x_ND = gather_rows(x_TD, token_M[: sum(counts)])
        return combine_rows(self._rows(x_ND, counts), inverse_TK, weight_TK)

    def _spread(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, dispatcher: AllToAllDispatcher
    ) -> Tensor:
        """Send each row to the rank of its expert and get its output back."""
        self._check(x_TD, expert_TK, weight_TK, dispatcher.group.size * dispatcher.num_local)
        whole = Piece(slice(0, x_TD.shape[0]), expert_TK)
        (ticket,) = dispatcher.prepare([whole], may_drop=True)()
        rows_ND = gather_rows(x_TD, ticket.token_N)
        rows_RD = used_here(dispatcher.send(rows_ND, ticket).wait())
        assert ticket.arrange_R is not None
        assert ticket.restore_R is not None
        assert ticket.counts is not None
        y_RD = self._rows(rows_RD.index_select(0, ticket.arrange_R), ticket.counts)
        y_RD = y_RD.index_select(0, ticket.restore_R)
        y_ND = used_here(dispatcher.give_back(y_RD, ticket).wait())
        return combine_rows(y_ND, ticket.inverse_TK, weight_TK)

    def _check(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: int) -> None:
        check_choices(x_TD, expert_TK, weight_TK, self.w_in.weights[0], experts)

    def _few_rows(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return packed_ffn(x_TD, expert_TK, weight_TK, self.w_in, self.w_out, self.activation)

    def _rows(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        """Apply the experts to rows that are sorted by expert."""
        first, second = self.w_in.weights[0], self.w_out.weights[0]
        w_in_1GD = x_ND.new_empty(1, first.rows, first.columns)
        w_out_1DF = x_ND.new_empty(1, second.rows, second.columns)
        y_ND = torch.empty_like(x_ND)
        few: list[Tensor] = []  # rows of experts that have few
        of_few: list[int] = []  # their experts
        start = 0
        for expert, count in enumerate(counts):
            rows = slice(start, start + count)
            start += count
            if count <= _MOST_ROWS:
                few.append(torch.arange(rows.start, rows.stop))
                of_few += [expert] * count
                continue
            unpack_weight(self.w_in.weights[expert], w_in_1GD[0])
            unpack_weight(self.w_out.weights[expert], w_out_1DF[0])
            end_e = torch.tensor([count], dtype=torch.int32, device=x_ND.device)
            operands = (x_ND[rows], end_e, w_in_1GD, w_out_1DF, self.activation)
            y_ND[rows], _ = ffn_forward(*operands, count_list=[count])
        if of_few:
            row_R = torch.cat(few).to(x_ND.device)
            expert_R1 = torch.tensor(of_few, device=x_ND.device).unsqueeze(1)
            one_R1 = torch.ones_like(expert_R1, dtype=torch.float32)
            y_ND[row_R] = self._few_rows(x_ND[row_R], expert_R1, one_R1)
        return y_ND


def _table(name: str, weights: Sequence[PackedWeight]) -> PackedTable:
    try:
        return PackedTable(weights)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _refuse_gradients(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("packed weights have no gradients; load the model dequantised to train it")
