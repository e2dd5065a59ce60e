"""The MoE layer's computation as one autograd function whose passes run by plans.

Read `stages.py` first: the layer's forward and backward pass each run their stages chunk by chunk,
in the order that a plan says. The serial layer is the plan with one chunk, not other code. The
passes themselves are in `forward.py` and `backward.py`.

Shapes:  T tokens on this rank   K experts per token   D width   e experts of this rank
         G, F see `ops/grouped_ffn.py`
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from gatewise.moe.backward import BackwardPass
from gatewise.moe.forward import ForwardPass
from gatewise.moe.job import Job
from gatewise.moe.tickets import PassPieces, PassTickets

__all__ = ["arithmetic_types", "moe_compute", "prepare_tickets", "request_tickets"]


def moe_compute(
    x_TD: Tensor, weight_TK: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor, job: Job
) -> Tensor:
    """Send tokens to their experts, apply these, and sum what comes back with the weights.

    Under autocast the tokens and the experts' weights are cast as those of `nn.Linear` are.

    Args:
        x_TD: tokens, in the experts' dtype.
        weight_TK: combine weights, fp32 (fp64 for fp64 tokens).
        w_in_eGD: first weights of this rank's experts.
        w_out_eDF: second weights of this rank's experts.
        job: routing, dispatcher and plans.

    Returns:
        (T, D) of the dtype of `x_TD`; under autocast of autocast's.

    Raises:
        ValueError: if tokens and weights are of different dtypes.
        LaneError: if communication fails.
    """
    x_TD, w_in_eGD, w_out_eDF = arithmetic_types(x_TD, w_in_eGD, w_out_eDF)
    tickets = job.tickets or prepare_tickets(job)
    result: Tensor = _MoECompute.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        x_TD, weight_TK, w_in_eGD, w_out_eDF, job, tickets
    )
    return result


class _MoECompute(torch.autograd.Function):
    """Both passes, and what is kept between them."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes operands by position
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        w_in_eGD: Tensor,
        w_out_eDF: Tensor,
        job: Job,
        tickets: PassTickets,
    ) -> Tensor:
        forward = ForwardPass(job, tickets, x_TD, weight_TK, (w_in_eGD, w_out_eDF))
        y_TD = forward.run()
        ctx.job, ctx.tickets = job, tickets
        ctx.lengths = [len(kept) for kept in forward.received]
        ctx.returned = len(forward.returned)
        # everything large goes through save_for_backward, so that recomputation can drop it
        ctx.save_for_backward(
            weight_TK, w_in_eGD, w_out_eDF, *forward.returned, *sum(forward.received, ())
        )
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        weight_TK, w_in_eGD, w_out_eDF, *rest = ctx.saved_tensors
        returned, rest = rest[: ctx.returned], rest[ctx.returned :]
        received = []
        for length in ctx.lengths:
            received.append(tuple(rest[:length]))
            rest = rest[length:]
        backward = BackwardPass(
            ctx.job,
            ctx.tickets,
            (returned, received),
            dy_TD=dy_TD,
            weight_TK=weight_TK,
            weights=(w_in_eGD, w_out_eDF),
            need_dx=ctx.needs_input_grad[0],
        )
        return *backward.run(), None, None


def arithmetic_types(
    x_TD: Tensor, w_in_eGD: Tensor, w_out_eDF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and weights as autocast casts them.

    Raises:
        ValueError: if their types differ.
    """
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        small = torch.get_autocast_dtype(kind)
        x_TD, w_in_eGD, w_out_eDF = (
            tensor if tensor.dtype == torch.float64 else tensor.to(small)
            for tensor in (x_TD, w_in_eGD, w_out_eDF)
        )
    if not x_TD.dtype == w_in_eGD.dtype == w_out_eDF.dtype:
        raise ValueError(
            f"the tokens are {x_TD.dtype} and the experts' weights {w_in_eGD.dtype} and "
            f"{w_out_eDF.dtype}; cast one of them, or use torch.autocast"
        )
    return x_TD, w_in_eGD, w_out_eDF


def prepare_tickets(job: Job) -> PassTickets:
    """Exchange counts and make the tickets of the passes that there will be."""
    return request_tickets(job)()


def request_tickets(job: Job) -> Callable[[], PassTickets]:
    """Start to exchange counts; what is returned waits for them and makes the tickets."""
    with record_function("moe.prepare"):
        pieces = PassPieces.of(job.schedule)
        agree = job.dispatcher.prepare(pieces.cut(job.expert_TK), may_drop=job.may_drop)
    moves = job.dispatcher.moves

    def tickets() -> PassTickets:
        with record_function("moe.prepare"):
            with job.execution.communication("exchange_counts") if moves else nullcontext():
                prepared = agree()
            return pieces.tickets(prepared)

    return tickets
