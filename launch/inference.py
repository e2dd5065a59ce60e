"""Commands that only run a model: on this process, or on ranks that they start.

Read first: `spawn.py`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gatewise.launch.run_folder import RunFolder
from gatewise.launch.spawn import run_ranks
from gatewise.launch.world import Place, threads_per_rank
from gatewise.moe.config import ModelConfig
from gatewise.parallel.config import ParallelConfig, divisors
from gatewise.parallel.errors import ConfigError

__all__ = ["check_ranks", "run_model"]


def check_ranks(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Refuse degrees that do not serve a model that only runs.

    Raises:
        ConfigError: naming the field.
    """
    for name in ("expert_shard", "tensor", "shard"):
        value = getattr(parallel, name)
        if value != 1:
            raise ConfigError(
                f"parallel.{name} is {value}, which is for training; experts are spread whole "
                "here, by parallel.ranks and parallel.expert"
            )
    experts = max(model.num_experts, 1)
    if experts % parallel.expert:
        raise ConfigError(
            f"parallel.expert is {parallel.expert}, which does not divide model.num_experts "
            f"({model.num_experts}); choose one of {divisors(experts)}"
        )


def run_model(
    body: Callable[..., Mapping[str, Any]],
    parallel: ParallelConfig,
    args: Sequence[Any],
    folder: RunFolder,
) -> dict[str, Any]:
    """Run `body(place, *args)` on every rank and return what rank 0 has to report.

    Args:
        body: a module-level function; what rank 0 prints reaches the user.
        parallel: degrees and threads.
        args: further arguments; with several ranks they are pickled.
        folder: of the run; ranks of their own processes log there.

    Raises:
        RankFailure: if one of several ranks raises or dies.
    """
    ranks = parallel.ranks
    threads = threads_per_rank(parallel.threads, ranks, os.environ)
    if ranks == 1:
        return dict(body(Place(rank=0, world_size=1, threads=threads), *args))
    outcomes = run_ranks(body, ranks, args, threads=threads, logs=folder.logs)
    peaks = [outcome.peak_rss_mb for outcome in outcomes]
    return {
        **(outcomes[0].result or {}),
        "peak_rss_mb": max(peaks),
        "rank_peak_rss_mb": peaks,
    }
