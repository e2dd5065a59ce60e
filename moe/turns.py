"""In which order parts of a micro-batch take their steps through the blocks, side by side.

A part enters a block (its attention and router), sends its rows, has them gathered within its node
where ranks split experts, lets its experts work on them, and has what they made collected. One
thread leads all parts, so what it does while rows travel decides how much of their way is hidden.
`side_by_side.py` runs these turns, and the planner predicts them.

With two or three parts all enter a block before the first works, and all have worked before the
first enters the next block. From four on the parts follow each other without a pause between
blocks: while part i enters, the rows of part i - 1 leave, and the experts of the part that comes
next in line work; so rows of every part travel beside the work of at least one other, and so do
the counts that ranks tell each other before rows leave. Rows of split experts have two more ways to
go, within the node, before and behind the experts. Lanes carry them, first in, first out, so they
are gathered and collected in turns of their own: where a lane's next task comes too early, those
behind it wait with it.

Source:  attention of one part beside the rows of another: FlowMoE (NeurIPS 2025). Of the rounds
    with these steps in which a part works between another's `enter` and `send`, none was predicted
    faster, with four parts and experts that take a third of the time of their rows, the same, and
    twice as much; counts that are waited for at once would win 0.3 % at most.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Turn", "turns"]

Step = Literal["enter", "send", "gather", "work", "collect"]
_FOLLOWING = 4  # from so many parts on, parts follow each other


@dataclass(frozen=True, slots=True)
class Turn:
    """What one part does next."""

    step: Step
    block: int
    part: int


def turns(blocks: int, parts: int, *, is_sharded: bool) -> Iterator[Turn]:
    """Yield all turns in order; those of one part of one block are the five steps.

    Args:
        blocks: of the model.
        parts: of the micro-batch.
        is_sharded: whether ranks of a node split experts; else nothing is gathered.
    """
    if parts < _FOLLOWING:
        for block in range(blocks):
            for part in range(parts):
                yield Turn("enter", block, part)
                yield Turn("send", block, part)
            for part in range(parts):
                yield Turn("gather", block, part)
                yield Turn("work", block, part)
                yield Turn("collect", block, part)
        return
    last = parts - 1
    steps: tuple[tuple[Step, int], ...]
    if is_sharded:
        steps = (("enter", 0), ("gather", 1), ("work", 2), ("collect", 3), ("send", 0))
    else:
        steps = (("gather", last), ("work", last), ("collect", last), ("send", 1), ("enter", 0))
    for slot in range(blocks * parts + max(behind for _, behind in steps)):
        for step, behind in steps:
            if 0 <= slot - behind < blocks * parts:
                yield Turn(step, *divmod(slot - behind, parts))
