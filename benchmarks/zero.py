"""Compare DeepSpeed's ZeRO 1 and 2 with our engine: losses of every step, memory of every rank.

    OMP_NUM_THREADS=1 python benchmarks/zero.py --ranks 2 4 --steps 20

Each row is a `gatewise train` of its own, on the same text and seed, experts over 2 ranks. `steps`
is the resident memory of rank 0 after the last step (freed memory stays with the process, so it is
the most of all steps), `peak` that of the fullest rank at the end, the copy that a checkpoint is
written from included; `base` is a run with next to no model, for the share of the process itself.
`moments` is what the optimizer keeps on the fullest rank, copies of the weights included. Prints a
table, and `rows` as JSON.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENGINES = {
    "ours": [],
    "ours, shard": ["parallel.shard=2"],
    "ZeRO 1": ["engine=deepspeed", "deepspeed.stage=1"],
    "ZeRO 2": ["engine=deepspeed", "deepspeed.stage=2"],
}
SMALL = ["model.layers=1", "model.hidden=32", "model.heads=2", "model.expert_width=16"]
LARGE = ["model.layers=2", "model.hidden=1024", "model.heads=8", "model.expert_width=512"]
COMMON = ["model.num_experts=8", "precision=fp32", "parallel.expert=2", "log_every=1", "seed=1"]
COMMON += ["batch.sequences=8", "data.sequence_length=16", "wandb.mode=off", "evaluation.tokens=64"]
MOMENTS = re.compile(r"([\d.]+) MB of moments and copies")


def train(folder: Path, ranks: int, steps: int, settings: list[str]) -> dict[str, Any]:
    """Train and return the losses of all steps and the memory of the fullest rank."""
    command = [sys.executable, "-m", "gatewise.launch.cli", "train", *COMMON, *settings]
    command += [f"run.dir={folder}", f"data.cache={folder.parent}/cache", f"steps={steps}"]
    command += [f"data.path={folder.parent}/text.txt", f"parallel.ranks={ranks}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row]
    logs = "".join(file.read_text(encoding="utf-8") for file in folder.glob("logs/**/*.log"))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {
        "losses": [row["train/loss"] for row in rows],
        "steps_mb": rows[-1]["train/memory_mb"],
        "peak_mb": max(result["rank_peak_rss_mb"]),
        "moments_mb": max((float(size) for size in MOMENTS.findall(logs)), default=None),
    }


def main() -> None:
    """Run all engines at all numbers of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = "".join(f"line {n} of {n % 7} and {n * n}\n" for n in range(4000))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        for ranks in options.ranks:
            base = train(folder / f"base_{ranks}", ranks, 1, SMALL)["steps_mb"]
            wanted: list[float] = []
            for name, settings in ENGINES.items():
                if name == "ours, shard" and ranks == 2:
                    continue  # its experts have one replica, which nothing splits
                row = train(folder / f"{name}_{ranks}", ranks, options.steps, [*LARGE, *settings])
                wanted = wanted or row["losses"]
                pairs = zip(row.pop("losses"), wanted, strict=True)
                row["loss_difference"] = max(abs(mine - theirs) for mine, theirs in pairs)
                row |= {"ranks": ranks, "engine": name, "base_mb": base}
                found.append(row)
                print(
                    f"{ranks} ranks  {name:<12} steps {row['steps_mb']:6.0f} MB  peak "
                    f"{row['peak_mb']:6.0f} MB  base {base:4.0f} MB  moments "
                    f"{row['moments_mb'] or '-'} MB  losses differ by "
                    f"{row['loss_difference']:.1e} over {options.steps} steps",
                    flush=True,
                )
    print(json.dumps({"rows": found}))


if __name__ == "__main__":
    main()
