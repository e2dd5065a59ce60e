"""Policies that look beyond one layer: `whole_block` and `paired`; and the choice `auto`.

Read `policies.py` first. `whole_block` cuts a micro-batch between its sequences and sends the
parts through attention and experts of all blocks, so that one part's attention covers another's
rows on their way; weight gradients and slices of gradient sums fill what stays idle. `paired` runs
the forward pass of one micro-batch beside the backward pass of another. Both are list scheduling
on three lanes with the longest path first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from gatewise.moe.planning.beside import beside_pass, chain
from gatewise.moe.planning.policies import (
    LAYER_POLICIES,
    Pass,
    Problem,
    Proposal,
    best_pass,
    propose_layer,
)
from gatewise.moe.planning.search import search_passes
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Amount
from gatewise.parallel.schedule.orders import list_plan
from gatewise.parallel.schedule.plan import Stage, StageGraph, Task

__all__ = ["POLICIES", "choice_note", "choose", "propose", "propose_all", "unavailable"]

POLICIES = (*LAYER_POLICIES, "search", "whole_block", "paired")
_Choice = TypeVar("_Choice")
_FILLERS = ("experts_weights", "attention_weights", "reduce_end")
_SLICES = (1, 4)  # pieces of a block's gradient sum that are tried
_WORTH = 1e-3  # by how much a schedule must beat the serial one to be chosen


def unavailable(policy: str, problem: Problem) -> str:
    """Return why a policy cannot be used here, or nothing."""
    if policy == "whole_block" and problem.sequences < 2:
        return "whole_block cuts between sequences, and a micro-batch has 1: give it 2 or more"
    if policy == "paired" and problem.micro_batches < 2:
        return "paired needs 2 or more micro-batches in a step, and there is 1"
    return ""


def propose(policy: str, problem: Problem) -> Proposal:
    """Return what a policy proposes; `auto` is the best of all.

    Args:
        policy: one of `POLICIES`, or "auto".
        problem: the block.

    Raises:
        ConfigError: if there is no such policy, or it cannot be used here.
    """
    if policy == "auto":
        return choose(propose_all(problem))
    if policy not in POLICIES:
        raise ConfigError(f"policy is {policy!r}; it must be auto or one of {', '.join(POLICIES)}")
    reason = unavailable(policy, problem)
    if reason:
        raise ConfigError(f"policy is {policy}, but {reason}")
    if policy == "search":
        return Proposal.of(policy, search_passes(problem), problem)
    if policy == "whole_block":
        passes = {name: _whole_pass(problem, name) for name in ("forward", "backward")}
        return Proposal.of(policy, passes, problem, blocks=problem.blocks)
    if policy == "paired":
        passes = {"pair": _paired_pass(problem)}
        return Proposal.of(policy, passes, problem, blocks=problem.blocks)
    return propose_layer(policy, problem)


def propose_all(problem: Problem) -> list[Proposal]:
    """Return the proposals of every policy that can be used here, in the order of `POLICIES`."""
    return [propose(policy, problem) for policy in POLICIES if not unavailable(policy, problem)]


def choose(proposals: Sequence[Proposal]) -> Proposal:
    """Return the proposal with the shortest prediction, and note why if that is the serial one.

    Args:
        proposals: of one problem, the serial one among them.
    """
    best = min(proposals, key=lambda proposal: proposal.predicted_ms)
    serial = next(proposal for proposal in proposals if proposal.policy == "serial")
    best, note = choice_note(best, best.predicted_ms, serial, serial.predicted_ms)
    return replace(best, note=note)


def choice_note(
    best: _Choice, best_ms: float, serial: _Choice, serial_ms: float
) -> tuple[_Choice, str]:
    """Return the better of two with the reason; overlap must be worth its trouble."""
    if best_ms < serial_ms * (1 - _WORTH):
        return best, f"{serial_ms / best_ms:.2f} times as fast as serial"
    return serial, "overlap would not pay here: cutting costs more starts than it hides"


def _listed(stages: Iterable[Stage], amounts: Mapping[str, Amount], chunks: int) -> Pass:
    graph = StageGraph(tuple(stages))
    fillers = [s.name for s in graph.stages if s.name.rpartition(".")[2] in _FILLERS]

    def ms(task: Task) -> float:
        own = graph.stage(task.stage).shares
        return amounts[task.stage].ms(own[task.chunk] if own else 1.0 / chunks)

    return Pass(graph, list_plan(graph, chunks, ms, fillers=fillers), amounts)


def _whole_pass(problem: Problem, name: str) -> Pass:
    degrees = range(1, min(problem.max_chunks, problem.sequences) + 1)
    candidates = []
    for slices in _SLICES if name == "backward" and problem.reduce_amount.size else (1,):
        stages, amounts = chain(problem, name, slices=slices)
        candidates += [_listed(stages, amounts, chunks) for chunks in degrees]
    # a list is not always better than the plain order
    candidates += [beside_pass(problem, name, chunks) for chunks in degrees]
    return best_pass(candidates, problem.interference)


def _paired_pass(problem: Problem) -> Pass:
    forward, forward_amounts = chain(problem, "forward", prefix="f")
    candidates = []
    for slices in _SLICES if problem.reduce_amount.size else (1,):
        backward, backward_amounts = chain(problem, "backward", prefix="b", slices=slices)
        amounts = forward_amounts | backward_amounts
        degrees = range(1, min(2, problem.max_chunks, problem.sequences) + 1)
        candidates += [_listed([*forward, *backward], amounts, chunks) for chunks in degrees]
    return best_pass(candidates, problem.interference)
