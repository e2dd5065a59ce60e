"""Whether a prediction that is off is noticed, and one that is right is left alone."""

import pytest

from gatewise.moe.stages import Schedule
from gatewise.parallel.collectives import NO_GROUP
from gatewise.parallel.schedule.plan import Task
from gatewise.parallel.schedule.timeline import Interval, Timeline, play
from gatewise.training.drift import DriftWatch, layer_ms

STEPS = 3


def predicted(ms: float = 1.0) -> dict[str, Timeline]:
    """Return the passes of a layer whose tasks all take as long."""
    serial = Schedule.serial(2)
    return {
        "forward": play(serial.forward_graph, serial.forward, lambda task, share: ms),
        "backward": play(serial.backward_graph, serial.backward, lambda task, share: ms),
    }


def step(lines: dict[str, Timeline], *, layers: int = 2, micro: int = 2) -> Timeline:
    """Return what a step with such passes looks like to the recorder."""
    found: list[Interval] = []
    now = 0.0
    for _ in range(micro):
        order = [("forward", layer) for layer in range(layers)]
        order += [("backward", layer) for layer in reversed(range(layers))]
        for name, layer in order:
            now += 5.0  # of attention
            for i in lines[name].intervals:
                task = Task(f"{layer}.{i.task.stage}", i.task.chunk)
                start, end = now + i.start_ms, now + i.end_ms
                found.append(Interval(task, i.lane, i.resource, start, end, end - start))
            now += lines[name].total_ms
    found.append(Interval(Task("reduce", 0), "compute", "inter", now, now + 50.0, 50.0))
    return Timeline(tuple(sorted(found, key=lambda i: i.start_ms)))


@pytest.mark.parametrize("micro", [1, 3])
def test_passes_of_all_layers_and_micro_batches_are_found(micro: int) -> None:
    lines = predicted()
    total = sum(line.total_ms for line in lines.values())
    assert layer_ms(step(lines, micro=micro), lines) == pytest.approx(total)


def answers(true_ms: float, profile_ms: float, steps: int) -> list[bool]:
    watch = DriftWatch(predicted(profile_ms), NO_GROUP, steps=STEPS)
    return [watch.add(step(predicted(true_ms))) for _ in range(steps)]


def test_costs_that_are_three_times_too_high_are_noticed_after_the_steps() -> None:
    assert answers(1.0, 3.0, 2 * STEPS) == [False, False, True] * 2
    assert answers(3.0, 1.0, STEPS) == [False, False, True]


def test_a_prediction_within_a_tenth_is_left_alone() -> None:
    assert not any(answers(1.0, 1.09, 3 * STEPS))
    assert not any(answers(1.09, 1.0, 3 * STEPS))


def test_a_single_step_as_predicted_is_enough_to_go_on() -> None:
    watch = DriftWatch(predicted(3.0), NO_GROUP, steps=STEPS)
    assert not watch.add(step(predicted(1.0)))
    assert not watch.add(step(predicted(3.0)))
    assert not watch.add(step(predicted(1.0)))


def test_the_metric_is_the_mean_error_since_the_last_record() -> None:
    watch = DriftWatch(predicted(3.0), NO_GROUP, steps=STEPS)
    watch.add(step(predicted(2.0)))
    watch.add(step(predicted(4.0)))
    assert watch.drain() == {"schedule/prediction_error": pytest.approx(0.0)}
    watch.add(step(predicted(2.0)))
    assert watch.drain() == {"schedule/prediction_error": pytest.approx(0.5)}
    assert watch.drain() == {}
