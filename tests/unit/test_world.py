"""Where a rank stands, as the launchers' variables tell it."""

import pytest

from gatewise.launch.world import detect_world, threads_per_rank
from gatewise.parallel.errors import ConfigError

MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_without_a_launcher_there_is_no_world() -> None:
    assert detect_world({}) is None
    assert detect_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None


def test_torchrun_tells_the_place() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    place = detect_world({**torchrun, **MEETING})
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert place.init_method == "env://"


def test_slurm_tells_the_place() -> None:
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    place = detect_world({**slurm, **MEETING})
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank) == (2, 4, 0)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK is 2"),
        ({"RANK": "zero", "WORLD_SIZE": "2", **MEETING}, "RANK is 'zero'"),
    ],
)
def test_a_broken_environment_is_one_line(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        detect_world(environ)


def test_threads_follow_the_setting_then_the_environment_then_the_cores() -> None:
    assert threads_per_rank(3, 2, {"OMP_NUM_THREADS": "5"}) == 3
    assert threads_per_rank(None, 2, {"OMP_NUM_THREADS": "5"}) == 5
    assert threads_per_rank(None, 1000, {}) == 1
