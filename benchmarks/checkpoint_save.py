"""Time one save beside `torch.distributed.checkpoint.async_save`, interleaved in one run.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_save.py --ranks 2 --tensors 3000 --megabytes 100

Each rank holds its own part of every tensor. `blocked` is the time until training may go on,
`total` until the checkpoint is on the disk, `cpu` the processor time of the rank in between (both
cores are needed by training, so this is what a save really costs). Ours also hashes every byte,
renames and deletes the checkpoint before the last; the other does none of it. Its plan is cached.
Prints one line of medians for each and the median of the ratios, and `rows` as JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from ranks import run_ranks

MEASURES = ("blocked_ms", "total_ms", "cpu_ms")


def timed(begin: Callable[[], Callable[[], object]]) -> dict[str, float]:
    """Measure a save; `begin` starts it and returns what waits for its end."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    finish = begin()
    blocked = time.perf_counter() - wall
    finish()
    total = time.perf_counter() - wall
    seconds = (blocked, total, time.process_time() - cpu)
    return {name: 1000 * value for name, value in zip(MEASURES, seconds, strict=True)}


def body(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    """Save alternately with both, on every rank; print on rank 0."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    from gatewise.training.checkpoint_format import FlatRange
    from gatewise.training.checkpointer import Checkpointer

    warnings.simplefilter("ignore")
    numel = int(options.megabytes * 1e6 / 4 / options.tensors / world)
    state = {f"layers.{i // 9}.weight{i % 9}": torch.randn(numel) for i in range(options.tensors)}
    ranges = {n: FlatRange(t, rank * numel, (world * numel,)) for n, t in state.items()}
    group = dist.new_group(backend="gloo")
    ours = Checkpointer(Path(folder) / "ours", keep_last=2, asynchronous=True)
    theirs = DefaultSavePlanner(flatten_state_dict=False, enable_plan_caching=True)

    def save_ours(step: int) -> Callable[[], object]:
        ours.save(step, ranges, meta={})
        return ours.wait

    def save_theirs(step: int) -> Callable[[], object]:
        done = dcp.async_save(
            {f"{name}.{rank}": tensor for name, tensor in state.items()},
            storage_writer=dcp.FileSystemWriter(Path(folder) / f"theirs_{step}"),
            planner=theirs,
            process_group=group,
        )
        return done.result

    rows: dict[str, list[dict[str, float]]] = {"gatewise": [], "async_save": []}
    for step in range(options.rounds + 1):  # the first makes plans and buffers
        rows["gatewise"].append(timed(lambda step=step: save_ours(step)))
        rows["async_save"].append(timed(lambda step=step: save_theirs(step)))
    ours.close()
    if rank == 0:
        report(rows)


def report(rows: dict[str, list[dict[str, float]]]) -> None:
    """Print medians without the first save, the first save, and the median ratios."""
    for name, measured in rows.items():
        later = {m: round(statistics.median(row[m] for row in measured[1:]), 1) for m in MEASURES}
        first = {m: round(measured[0][m], 1) for m in MEASURES}
        print(f"{name:12} later {later}  first {first}")
    pairs = list(zip(rows["gatewise"], rows["async_save"], strict=True))[1:]
    ratios = {m: round(statistics.median(a[m] / b[m] for a, b in pairs), 3) for m in MEASURES}
    print(f"gatewise / async_save: {ratios}")
    print(json.dumps({"rows": rows}))


def main() -> None:
    """Read the options and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensors", type=int, default=3000)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(body, options.ranks, (folder, options))


if __name__ == "__main__":
    main()
