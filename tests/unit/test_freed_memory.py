"""What the C allocator keeps for the next step, and what it gives back between kinds of work."""

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from gatewise.parallel.runtime import keep_freed_memory, memory_mb, return_freed_memory

assert keep_freed_memory()
here = torch.device("cpu")
blocks, between = [], []
for _ in range(64):
    blocks.append(torch.ones(1 << 19))  # 2 MiB
    between.append(torch.ones(64))  # holds the block apart from its neighbour
full = memory_mb(here)
del blocks
kept = memory_mb(here)
assert return_freed_memory()
print(full, kept, memory_mb(here))
"""


def test_freed_memory_is_kept_until_it_is_returned() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    # a process of its own: the allocator's settings hold for all that follows
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    full, kept, returned = map(float, done.stdout.split())
    assert kept > full - 30
    assert returned < full - 100
