"""Micro-batches that travel through a model side by side: whole blocks cover each other's rows.

Read `turns.py` and `stepwise.py` first. While the rows of one micro-batch travel, attention and
experts of the others work. In the backward pass autograd takes the steps in the reverse order of
the forward pass, so gradients travel side by side in the same way.

The order in which collectives are issued follows from the number of micro-batches alone.

Shapes:  B sequences of a micro-batch   S positions   T tokens of it   D width
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block, Decoder, DecoderOutput
from gatewise.moe.stepwise import CallStep, Host, StepwiseCall
from gatewise.moe.turns import turns
from gatewise.routers.api import Routing, RoutingContext

__all__ = ["forward_side_by_side"]


def forward_side_by_side(
    model: Decoder, batches: Sequence[Tensor], contexts: Sequence[RoutingContext]
) -> list[DecoderOutput]:
    """Return what `model` gives for each micro-batch; all may enter one backward pass.

    Args:
        model: without a router that decides ahead, recomputation, or sequences spread over ranks.
        batches: token ids (B, S) of each, on all ranks equally many.
        contexts: what the routers are told of each.

    Raises:
        LaneError: if communication fails.
    """
    assert model.ahead is None
    assert model.split.parts == 1
    host = Host()
    parts = [_Part(model, token_BS, contexts[i], i, host) for i, token_BS in enumerate(batches)]
    is_sharded = any(layer.dispatcher.is_sharded for layer in model.moe_layers())
    for turn in turns(len(model.blocks), len(parts), is_sharded=is_sharded):
        part = parts[turn.part]
        if turn.step == "enter":
            block = model.blocks[turn.block]
            assert isinstance(block, Block)
            part.enter(block)
        else:
            part.go_on(turn.step)
    return [part.leave(model) for part in parts]


class _Part:
    """One micro-batch on its way through the blocks.

    Args:
        model: whose blocks they are.
        token_BS: token ids.
        context: what the routers are told.
        place: among the micro-batches that go side by side.
        host: the thread that runs all of them.
    """

    def __init__(
        self,
        model: Decoder,
        token_BS: Tensor,
        context: RoutingContext,
        place: int,
        host: Host,
    ) -> None:
        self._place, self._host = place, host
        self._context = RoutingContext(
            token_ids=token_BS.flatten(),
            padding_T=context.padding_T,
            sequences=token_BS.shape[0],
            noise=context.noise,
            measures=context.measures,
        )
        self._rotary = model.rotary(token_BS.shape[1], device=token_BS.device)
        self._x_BSD = F.embedding(token_BS, model.embedding)
        self._call: StepwiseCall | None = None
        self._layer: MoELayer | None = None
        self._x_TD = self._x_BSD  # what the layer gets
        self._shared_TD: Tensor | None = None
        self._routings: list[Routing] = []

    def enter(self, block: Block) -> None:
        """Take what the block before gave, compute attention, and decide where rows go."""
        self._arrive()
        x_BSD = self._x_BSD
        x_BSD = x_BSD + block.attention(
            block.norm_attention(x_BSD), self._rotary, block.layer, None
        )
        normed_BSD = block.norm_feed_forward(x_BSD)
        layer = block.feed_forward
        if isinstance(layer, FeedForward):
            self._x_BSD = x_BSD + layer(normed_BSD)
            return
        self._x_BSD = x_BSD
        x_TD = self._x_TD = normed_BSD.flatten(0, 1)
        routing, self._context, may_drop = layer.decide(x_TD, self._context, block.layer)
        job = layer.job(routing.expert_TK, may_drop=may_drop, layer=block.layer)
        self._call = StepwiseCall(
            x_TD, routing.weight_TK, layer.experts, job, place=self._place, host=self._host
        )
        self._layer = layer
        self._routings.append(routing)

    def go_on(self, step: CallStep) -> None:
        """Take the next step of the call, in a block with experts."""
        if self._call is None or self._layer is None:
            return
        self._call.go_on(step)
        shared = self._layer.shared
        if step == "send" and shared is not None:
            self._shared_TD = shared(self._x_TD)

    def leave(self, model: Decoder) -> DecoderOutput:
        """Return what the model gives."""
        self._arrive()
        return DecoderOutput(model.norm_final(self._x_BSD), tuple(self._routings))

    def _arrive(self) -> None:
        if self._call is None:
            return
        y_TD = self._call.arrive()
        if self._shared_TD is not None:
            y_TD = y_TD + self._shared_TD
        self._x_BSD = self._x_BSD + y_TD.view_as(self._x_BSD)
        self._call = self._layer = self._shared_TD = None
