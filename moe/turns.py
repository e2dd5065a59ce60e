"""In which order parts of a micro-batch take their steps through the blocks, side by side.

A part enters a block (its attention and router), sends its rows, and lets its experts work on them
once they have arrived. One thread leads all parts, so what it does while rows travel decides how
much of their way is hidden. `side_by_side.py` runs these turns, and the planner predicts them.

With two or three parts all enter a block before the first works, and all have worked before the
first enters the next block. From four on the parts follow each other without a pause between
blocks: while part i enters, the rows of part i - 1 leave, and the experts of the part that comes
next in line work; so rows of every part travel beside the work of at least one other, and so do
the counts that ranks tell each other before rows leave.

Source:  all attention of a block, then all its experts: FlowMoE (NeurIPS 2025).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Turn", "turns"]

_FOLLOWING = 4  # from so many parts on, parts follow each other
Step = Literal["enter", "send", "work"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one part does next."""

    step: Step
    block: int
    part: int


def turns(blocks: int, parts: int) -> Iterator[Turn]:
    """Yield all turns in order; those of one part of one block are `enter`, `send`, `work`.

    Args:
        blocks: of the model.
        parts: of the micro-batch.
    """
    if parts < _FOLLOWING:
        for block in range(blocks):
            for part in range(parts):
                yield Turn("enter", block, part)
                yield Turn("send", block, part)
            for part in range(parts):
                yield Turn("work", block, part)
        return
    lags: tuple[tuple[Step, int], ...] = (("work", parts - 1), ("send", 1), ("enter", 0))
    for slot in range(blocks * parts + parts - 1):
        for step, lag in lags:
            if 0 <= slot - lag < blocks * parts:
                yield Turn(step, *divmod(slot - lag, parts))
