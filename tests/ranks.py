"""Run a test body on several gloo ranks: forkserver, file store, no ports.

Read first: `CONTRIBUTING.md`, "Tests". A body is a module-level function
`body(rank, world, *args)`.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

# The first assert_close in a child imports DTensor; preloading it saves seconds a test.
multiprocessing.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.device_mesh",
        "torch.distributed.tensor",
        "torch.distributed.checkpoint",
        "gatewise.training.trainer",
    ]
)


def _main(
    rank: int, world: int, store: str, body: Callable[..., None], args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),  # a busy machine is slow, not stuck
    )
    try:
        body(rank, world, *args)
    finally:
        dist.destroy_process_group()


def run_ranks(body: Callable[..., None], world: int = 2, args: Sequence[Any] = ()) -> None:
    """Run `body` on `world` ranks; a rank that raises ends the test with its traceback."""
    with tempfile.TemporaryDirectory() as tmp:
        start_processes(
            _main, (world, f"{tmp}/store", body, args), nprocs=world, start_method="forkserver"
        )
