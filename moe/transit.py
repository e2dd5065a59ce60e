"""What the two passes of the MoE layer have in common: rows on their way.

Shapes:  R rows received   D width
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.profiler import record_function

from gatewise.moe.dispatch import Ticket
from gatewise.moe.job import Job
from gatewise.moe.tickets import Chunk
from gatewise.parallel.collectives import Rows
from gatewise.parallel.schedule.executor import Handle, PlanRunner
from gatewise.parallel.schedule.plan import Task
from gatewise.parallel.streams import used_here

__all__ = ["StageFunction", "Transit", "run_stages"]

StageFunction = Callable[[int], Handle | None]  # of the chunk


class Transit:
    """The rows of each chunk of a pass: they are in one place at a time, or on their way.

    Args:
        chunks: of the pass.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._rows: dict[int, Tensor | Rows] = {}

    def put(self, index: int, rows: Tensor | Rows) -> None:
        """Leave the rows of a chunk to its next stage."""
        self._rows[index] = rows

    def take(self, index: int) -> Tensor:
        """Return the rows of a chunk, once they have arrived."""
        rows = self._rows.pop(index)
        return used_here(rows if isinstance(rows, Tensor) else rows.wait())

    def move(self, start: Callable[[Tensor, Ticket], Rows], index: int) -> Rows | None:
        """Send the rows of a chunk on their way, if there are any."""
        if index not in self._rows:
            return None
        moving = start(self.take(index), self._chunks[index].ticket)
        self.put(index, moving)
        return moving

    def take_arranged(self, index: int) -> Tensor:
        """Return the rows that a chunk's experts work on, part by part."""
        rows_RD, order_R = self.take(index), self._chunks[index].ticket.arrange_R
        return rows_RD if order_R is None else rows_RD.index_select(0, order_R)

    def put_restored(self, index: int, parts: Sequence[Tensor]) -> None:
        """Leave what the experts made of each part, in the order in which the rows came."""
        chunk = self._chunks[index]
        order_R, back_R = chunk.ticket.arrange_R, chunk.ticket.restore_R
        if len(parts) == 1:
            rows_RD = parts[0] if back_R is None else parts[0].index_select(0, back_R)
        else:
            assert order_R is not None
            rows_RD = parts[0].new_empty(order_R.shape[0], *parts[0].shape[1:])
            for part, made_RD in zip(chunk.parts, parts, strict=True):
                rows_RD.index_copy_(0, order_R[part.rows], made_RD)
        self.put(index, rows_RD)

    def __contains__(self, index: int) -> bool:
        return index in self._rows


def run_stages(
    runner: PlanRunner, functions: Mapping[str, StageFunction], job: Job, *, overlaps: bool
) -> None:
    """Run a pass.

    Args:
        runner: its plan.
        functions: what each stage does with a chunk.
        job: says where to run, and who notes when.
        overlaps: whether there is anything to gain from lanes.
    """
    lanes, recorder = job.execution.lanes if overlaps else None, job.execution.recorder
    if recorder is not None:
        recorder.prefix = f"{job.layer}."
        recorder = recorder if recorder.is_on else None

    def run(task: Task) -> Handle | None:
        with record_function(f"moe.{task.stage}"):  # names for profiles
            return functions[task.stage](task.chunk)

    runner.run(run, lanes=lanes, recorder=recorder)
