"""What a rank runs on: its place among the ranks, its device, its threads and its groups.

Nothing happens at import. `start_runtime` joins the ranks, `Runtime.stop` leaves them.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import Groups, make_groups

__all__ = [
    "Runtime",
    "answering_for_cuda",
    "keep_freed_memory",
    "memory_mb",
    "multiplies_bf16",
    "return_freed_memory",
    "running",
    "start_runtime",
]

_RECORDED = "2000"  # collectives that torch's flight recorder keeps, for `stuck.py`


@dataclass(frozen=True, slots=True)
class Runtime:
    """One rank's place, device and groups."""

    rank: int
    world: int
    device: torch.device
    groups: Groups

    def stop(self) -> None:
        """Leave the ranks; safe to call without any."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start_runtime(
    config: ParallelConfig, *, rank: int = 0, world: int = 1, init_method: str | None = None
) -> Runtime:
    """Join the ranks and choose the device.

    Args:
        config: degrees; `config.ranks` must equal `world`.
        rank: this process, from 0.
        world: number of processes.
        init_method: where the ranks meet, as torch.distributed takes it ("file://...", or None
            for the environment that torchrun sets).

    Raises:
        ValueError: if `world` is not what the degrees were checked for.
    """
    if world != config.ranks:
        raise ValueError(
            f"parallel.ranks is {config.ranks} but {world} ranks were started; "
            "start as many, or leave parallel.ranks out"
        )
    local = int(os.environ.get("LOCAL_RANK", rank))
    threads = config.threads or max(1, (os.cpu_count() or 1) // _ranks_here(world))
    torch.set_num_threads(threads)
    device, backend = torch.device("cpu"), "gloo"
    keep_freed_memory()
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local % torch.cuda.device_count()), "nccl"
        torch.cuda.set_device(device)
    if world > 1:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _RECORDED)
        dist.init_process_group(
            backend,
            init_method=init_method,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=config.timeout),
        )
    return Runtime(rank, world, device, make_groups(config))


@contextlib.contextmanager
def running(
    config: ParallelConfig, *, rank: int = 0, world: int = 1, init_method: str | None = None
) -> Iterator[Runtime]:
    """Start a runtime and stop it again."""
    runtime = start_runtime(config, rank=rank, world=world, init_method=init_method)
    try:
        yield runtime
    finally:
        runtime.stop()


@contextlib.contextmanager
def answering_for_cuda() -> Iterator[None]:
    """Answer code that asks for the CUDA device, or waits for it, where there is none.

    For the time of the block, and nothing where there is a GPU. Megatron-core's distributed
    checkpoints ask so without need (Megatron-LM pull request 6270 is about such places).
    """
    if torch.cuda.is_available():
        yield
        return
    before = (torch.cuda.current_device, torch.cuda.synchronize)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.current_device, torch.cuda.synchronize = before


def keep_freed_memory() -> bool:
    """Ask the C allocator to keep freed memory for the next step; return whether it took it.

    A training step allocates and frees the same large tensors again and again. By default glibc
    returns each to the system, and the next one is paid for page by page: first touch of fresh
    memory runs at about 2 GB/s, a sixth of the speed of memory. GPUs have a caching allocator in
    torch; CPUs have none. Other C libraries and allocators are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # of glibc's malloc.h
    never = 2**31 - 1
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, never)) and bool(
        mallopt(m_arena_max, 1)
    )


def return_freed_memory() -> bool:
    """Give the system what the C allocator keeps; return whether this C library can.

    For a change of work: memory kept for tensors of one size, in pieces, does not serve another.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return False
    return bool(trim(0))


def memory_mb(device: torch.device) -> float:
    """Return what this rank holds now, in MiB: of the GPU's memory, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            pages = int(stream.read().split()[1])
    except OSError:  # not Linux
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def multiplies_bf16(device: torch.device) -> bool:
    """Tell whether `device` has units for bf16 products, so that bf16 is faster than fp32."""
    if device.type != "cpu":
        return True
    # private names: torch 2.13 has no public query for these processor features
    return any(
        bool(getattr(torch.cpu, name)())
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        if hasattr(torch.cpu, name)
    )


def _ranks_here(world: int) -> int:
    """Return how many ranks share this machine."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return max(1, int(value))
    return world
