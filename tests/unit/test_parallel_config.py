"""Degrees of parallelism: what is refused before any rank starts."""

import pytest
import torch

from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.runtime import multiplies_bf16, running, start_runtime


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0}, "parallel.ranks is 0; it must be at least 1"),
        ({"ranks": 4, "expert": 3}, r"parallel.expert is 3.*choose one of \[1, 2, 4\]"),
        ({"ranks": 4, "shard": 8}, "parallel.shard is 8, which does not divide parallel.ranks"),
        ({"ranks": 6, "expert": 3, "shard": 2}, "one must divide the other"),
        (
            {"ranks": 8, "expert": 4, "expert_shard": 4},
            r"expert x parallel.expert_shard is 4 x 4 = 16, which does not divide parallel.ranks "
            r"\(8\); choose parallel.expert from \[1, 2\]",
        ),
        (
            {"ranks": 8, "expert_shard": 4, "node": 2},
            r"parallel.expert_shard is 4, which does not divide the 2 ranks of a node.*\[1, 2\]",
        ),
        ({"ranks": 4, "node": 3}, "parallel.node is 3, which does not divide parallel.ranks"),
        ({"node": 0}, "parallel.node is 0; it must be at least 1 or null"),
        ({"expert_shard": 0}, "parallel.expert_shard is 0"),
        (
            {"ranks": 12, "expert": 2, "expert_shard": 2, "shard": 3},
            "parallel.shard is 3 and parallel.expert x parallel.expert_shard is 4; one must",
        ),
        ({"dispatch": "3dh"}, "parallel.dispatch is .3dh.; it must be one of direct, 1dh, 2dh"),
        (
            {"ranks": 12, "expert": 6, "node": 4, "dispatch": "2dh"},
            "do not fill nodes of 4 ranks evenly; use parallel.dispatch=direct",
        ),
        ({"threads": 0}, "parallel.threads is 0"),
        ({"timeout": 0.0}, "parallel.timeout is 0.0"),
    ],
)
def test_degrees_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)  # type: ignore[arg-type]


def test_as_many_ranks_must_start_as_the_settings_say() -> None:
    with pytest.raises(ValueError, match=r"parallel.ranks is 2 but 1 ranks were started"):
        start_runtime(ParallelConfig(ranks=2))


def test_one_rank_needs_no_group_and_keeps_its_threads() -> None:
    with running(ParallelConfig(threads=1)) as runtime:
        assert torch.get_num_threads() == 1
        assert runtime.groups.control.handle is None
        assert runtime.groups.ranks == runtime.world == 1
        assert isinstance(multiplies_bf16(runtime.device), bool)
    assert not torch.distributed.is_initialized()
