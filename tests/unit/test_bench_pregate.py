"""The numbers that `gatewise bench pregate` puts together."""

import pytest

from gatewise.launch.bench_pregate import _rows, _split, _with_defaults
from gatewise.parallel.errors import ConfigError

COUNTS = {
    "metadata_exchanges": 1,
    "metadata_exchanges_in_layers": 0,
    "row_exchanges": 8,
    "other_collectives": 3,
    "host_reads_in_layers": 0,
}


def result(seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> dict[str, object]:
    return {"seconds": seconds, "losses": losses, "counts": dict.fromkeys(seconds, COUNTS)}


def test_a_step_lasts_as_long_as_its_slowest_rank_and_ratios_are_of_one_turn() -> None:
    fast = {"layer": [1.0, 1.0, 4.0], "step": [0.5, 0.5, 0.5]}
    slow = {"layer": [2.0, 1.0, 1.0], "step": [1.0, 0.5, 0.5]}
    same = {"layer": [3.0, 2.0], "step": [3.0, 2.0]}
    layer, step = _rows([result(fast, same), result(slow, same)])
    assert (layer.exchange, step.exchange) == ("layer", "step")
    assert (layer.step_ms, layer.relative) == (2000.0, 1.0)
    assert (step.step_ms, step.relative) == (500.0, 0.5)  # of 1/2, 0.5/1, 0.5/4
    assert layer.equal_losses
    assert step.equal_losses
    assert step.metadata_exchanges == 1


def test_losses_that_differ_on_one_rank_in_one_bit_are_told() -> None:
    times = {"layer": [1.0], "step": [1.0]}
    same = {"layer": [3.0], "step": [3.0]}
    other = {"layer": [3.0], "step": [3.0000000000000004]}
    _, step = _rows([result(times, same), result(times, other)])
    assert not step.equal_losses


def test_what_the_user_gives_replaces_a_default() -> None:
    words = _with_defaults(["parallel.ranks=2", "parallel.expert=2"])
    assert "parallel.ranks=4" not in words
    assert "router=gru_pregate" in words
    assert _split(["pregate.steps=3", "seed=1"]) == (3, ["seed=1"])
    for wrong in ("pregate.steps=0", "pregate.turns=3"):
        with pytest.raises(ConfigError, match=r"`bench pregate` takes pregate\.steps"):
            _split([wrong])
