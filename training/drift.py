"""Whether the passes of the MoE layers take as long as was predicted.

Read `lane_meter.py` first. Costs change during a run: links get other users, loads shift. When
every one of so many steps in a row is off by more than a tenth, it is time to measure the costs
again; all ranks come to the same answer in the same step.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from gatewise.parallel.collectives import Group
from gatewise.parallel.schedule.plan import Task
from gatewise.parallel.schedule.timeline import Timeline

__all__ = ["DriftWatch", "layer_ms"]

_APART = 0.10  # a prediction may be off by so much


def layer_ms(line: Timeline, predicted: Mapping[str, Timeline]) -> float:
    """Return the mean time of one layer's passes in a step, forward and backward together.

    Args:
        line: what a step did; names of stages start with their layer's.
        predicted: of a layer's "forward" and "backward"; they tell which stages are of which.
    """
    of_pass = {i.task.stage: name for name, own in predicted.items() for i in own.intervals}
    ended = dict.fromkeys(predicted, 0.0)  # time of all passes
    count = dict.fromkeys(predicted, 0)
    under_way: dict[tuple[str, str], tuple[set[Task], float, float]] = {}
    for interval in line.intervals:
        layer, _, stage = interval.task.stage.rpartition(".")
        if stage not in of_pass:
            continue
        key = layer, of_pass[stage]
        tasks, start, end = under_way.get(key, (set(), interval.start_ms, interval.end_ms))
        if interval.task in tasks:  # of the next micro-batch
            ended[key[1]] += end - start
            count[key[1]] += 1
            tasks, start, end = set(), interval.start_ms, interval.end_ms
        under_way[key] = tasks | {interval.task}, start, max(end, interval.end_ms)
    for (_, name), (_, start, end) in under_way.items():
        ended[name] += end - start
        count[name] += 1
    return sum(ended[name] / count[name] for name in predicted if count[name])


class DriftWatch:
    """Compares what steps took with what was predicted.

    Args:
        predicted: of a layer's "forward" and "backward".
        control: all ranks; the mean over them counts.
        steps: that must be off until the costs are measured again.
    """

    def __init__(self, predicted: Mapping[str, Timeline], control: Group, *, steps: int) -> None:
        self._predicted, self._control = predicted, control
        self._predicted_ms = sum(line.total_ms for line in predicted.values())
        self._steps = steps
        self._window: list[float] = []  # measured ms of the steps since the last decision
        self._since_record: list[float] = []
        self.error = 0.0  # of the prediction in the last window, mean over ranks

    def add(self, line: Timeline) -> bool:
        """Take a step; return whether the prediction was off in all of the last steps.

        Every rank must call it for every step: at the end of a window they agree on the answer.
        """
        measured = layer_ms(line, self._predicted)
        self._window.append(measured)
        self._since_record.append(measured)
        if len(self._window) < self._steps:
            return False
        window = torch.tensor(self._window, dtype=torch.float64)
        self._window = []
        if self._control.handle is not None:
            dist.all_reduce(window, group=self._control.handle)
        errors = self._predicted_ms * self._control.size / window.clamp(min=1e-9) - 1
        self.error = float(errors.median())
        return bool((errors.abs() > _APART).all())

    def drain(self) -> dict[str, float]:
        """Return this rank's mean error of the prediction since the last record."""
        measured, self._since_record = self._since_record, []
        if not measured:
            return {}
        mean = max(sum(measured) / len(measured), 1e-9)
        return {"schedule/prediction_error": self._predicted_ms / mean - 1}
