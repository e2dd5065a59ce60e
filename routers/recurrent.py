"""The recurrent scorer of RMoE: a GRU that runs over the layers, once per token.

    x'_l = P_l x_l                  P_l of each layer
    h_l  = GRU(x'_l, h_{l-1})       one cell for all layers, h_0 = 0
    logits_l = G_l h_l              G_l of each layer

There is no recurrence over positions: a token's state starts at zero in the first MoE layer and
ends after the last, so generation needs no cache. The state is an input and an output of each
layer (`RoutingContext.state_TH`); dispatch and drops never touch it. Dense layers hand it on.

Shapes:  T tokens on this rank   D model width   H width of the state   E experts, all ranks
Source:  RMoE, arXiv:2408.06793, section 3; the cell has two biases and two matrices, as
         `torch.nn.GRUCell` and unlike the paper's eq. 3: only this fits its parameter counts.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.routers.api import RoutingContext
from gatewise.routers.config import Cell, Recurrence, RouterConfig
from gatewise.routers.shapes import shared_weights, state_width
from gatewise.routers.weights import RouterWeights

__all__ = ["RecurrentCell", "recurrent_logits"]


class RecurrentCell(RouterWeights):
    """The cell that the routers of all layers share.

    Args:
        config: kind of cell and width of the state.
        hidden: D.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    def __init__(self, config: RouterConfig, hidden: int) -> None:
        super().__init__(shared_weights(config, hidden))
        self.kind = config.cell
        self.state_dim = config.state_dim

    def forward(self, x_TI: Tensor, state_TH: Tensor | None) -> Tensor:
        """Return the next state.

        Args:
            x_TI: input, fp32 or fp64.
            state_TH: of the previous layer; None is zero. An LSTM's holds (h, c).
        """
        wide = x_TI.dtype
        weights = [w.to(wide) for w in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
        if self.kind is Cell.lstm:
            if state_TH is None:
                state_TH = x_TI.new_zeros(x_TI.shape[0], 2 * self.state_dim)
            return torch.cat(torch.lstm_cell(x_TI, state_TH.split(self.state_dim, 1), *weights), 1)
        if state_TH is None:
            state_TH = x_TI.new_zeros(x_TI.shape[0], self.state_dim)
        step = torch.gru_cell if self.kind is Cell.gru else torch.rnn_tanh_cell
        return step(x_TI, state_TH, *weights)


def recurrent_logits(
    x_TD: Tensor,
    context: RoutingContext,
    *,
    cell: RecurrentCell,
    projection_HD: Tensor | None,
    weight_EH: Tensor,
    config: RouterConfig,
) -> tuple[Tensor, RoutingContext]:
    """Return the logits and the context with the state for the next MoE layer.

    Args:
        x_TD: fp32 or fp64.
        context: its state comes from the previous MoE layer.
        cell: shared by all layers.
        projection_HD: P of this layer; None where the cell reads the token itself.
        weight_EH: G of this layer.
        config: what is carried over (`recurrence`, `residual_scores`).
    """
    num_experts, wide = weight_EH.shape[0], x_TD.dtype
    carried_TH = context.state_TH
    if carried_TH is not None and config.recurrence is Recurrence.detach:
        carried_TH = carried_TH.detach()
    state_TH, before_TE = carried_TH, None
    if carried_TH is not None and config.residual_scores:
        width = carried_TH.shape[1] - num_experts
        state_TH, before_TE = carried_TH.split((width, num_experts), 1)
    if config.recurrence is Recurrence.none:
        state_TH = None
    input_TI = x_TD if projection_HD is None else F.linear(x_TD, projection_HD.to(wide))
    state_TH = cell(input_TI, state_TH)
    own_TE = F.linear(state_TH[:, : cell.state_dim], weight_EH.to(wide))
    logits_TE = own_TE if before_TE is None else own_TE + config.residual_scores * before_TE
    if not state_width(config, num_experts):
        return logits_TE, context
    parts = [state_TH] if config.recurrence is not Recurrence.none else []
    parts += [own_TE] if config.residual_scores else []
    return logits_TE, replace(
        context, state_TH=parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    )
