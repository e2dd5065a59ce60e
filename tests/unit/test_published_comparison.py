"""The replica of the published comparison of schedules, from benchmarks/."""

from types import ModuleType

import pytest
from scripts import load_script


@pytest.fixture(scope="module")
def replica() -> ModuleType:
    return load_script("published_comparison")


@pytest.mark.parametrize(
    ("name", "tutel_improved", "no_iio", "fsmoe"),
    [("A", 1.07, 1.10, 1.36), ("B", 1.11, 1.15, 1.35)],
)
def test_every_eleventh_layer_gives_the_known_means(
    replica: ModuleType, name: str, tutel_improved: float, no_iio: float, fsmoe: float
) -> None:
    testbed = replica.TESTBEDS[name]
    layers = list(replica.layers(testbed))
    assert len(layers) == 1458
    found = [replica.times_of(layer, testbed) for layer in layers[::11]]
    cases = [(times, replica.choose(times)) for times in found]
    means = replica.mean_speedups(cases, replica.Interference.none())
    assert means["tutel"] == 1
    assert means["tutel_improved"] == pytest.approx(tutel_improved, abs=0.01)
    assert means["fsmoe_no_iio"] == pytest.approx(no_iio, abs=0.01)
    assert means["fsmoe"] == pytest.approx(fsmoe, abs=0.01)


@pytest.mark.parametrize(("name", "different"), [("A", 996), ("B", 873)])
def test_as_many_layers_as_known_take_different_degrees(
    replica: ModuleType, name: str, different: int
) -> None:
    testbed = replica.TESTBEDS[name]
    count = 0
    for layer in replica.layers(testbed):
        times = replica.times_of(layer, testbed)
        forward = {r: replica.staged_ms(times.forward[r]) for r in replica.DEGREES}
        backward = {r: replica.staged_ms(times.backward[r], times.rest) for r in replica.DEGREES}
        count += min(forward, key=forward.get) != min(backward, key=backward.get)
    assert count == different


def test_interference_fitted_on_one_cluster_predicts_the_other(replica: ModuleType) -> None:
    for row in replica.compare(every=29)["interference"]:
        assert abs(row["error"]) < 0.05
        assert 0.3 < row["extra"] < 0.7
