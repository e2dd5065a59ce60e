"""Folders as `train` and `compress` leave them, without training: for tests of what reads them."""

import json
import math
from pathlib import Path
from typing import Any

from gatewise.conf.compose import config_to_yaml
from gatewise.moe.config import ModelConfig
from gatewise.training.config import TrainConfig

__all__ = ["make_compression", "make_run", "make_trace"]


def make_run(
    folder: Path, *, steps: int = 40, layers: int = 2, experts: int = 4, lr: float = 1e-3
) -> Path:
    """Write the folder of a finished run that was restarted once, and return it."""
    folder.mkdir(parents=True)
    config = TrainConfig(
        name=folder.name,
        steps=steps,
        model=ModelConfig(layers=layers, num_experts=experts, hidden=64, heads=2),
    )
    config.optim.lr = lr
    (folder / "config.yaml").write_text(config_to_yaml(config))
    (folder / "environment.json").write_text('{"cpu": "<b>one</b> & other", "cores": 2}\n')
    starts = [{"attempt": 1, "step": 0}, {"attempt": 2, "step": steps // 2}]
    (folder / "attempts.jsonl").write_text(
        "".join(json.dumps({**start, "time": "2026-11-22T00:00:00Z"}) + "\n" for start in starts)
    )
    records: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        loss = 2 + math.exp(-step / 10)
        values = {
            "max_violation": 0.5 + layers / step,
            "dead_frac": 1 / experts if step < 8 else 0.0,
            "router_entropy": 1.2,
            "router_confidence": 0.4,
        }
        records.append(
            {
                "step": step,
                "steps": steps,
                "train/loss": loss,
                "train/loss_mean": loss,
                "train/lr": lr,
                "train/grad_norm": 1 + 1 / step,
                "train/tokens": 1000 * step,
                "train/tokens_per_second": 5000.0,
                "grad/dense_norm": 0.9,
                "grad/router_norm": 0.01,
                "grad/expert_norm": 0.2,
                "schedule/exposed_communication_ms": 30.0,
                "experts/load_ratio": [
                    [1 + 0.5 * math.cos(step / 9 + layer + expert) for expert in range(experts)]
                    for layer in range(layers)
                ],
                **{f"moe/{name}": value for name, value in values.items()},
                **{
                    f"moe/layer_{layer:02d}/{name}": value + 0.01 * layer
                    for name, value in values.items()
                    for layer in range(layers)
                },
            }
        )
        if step % 10 == 0:
            churn = {"val/router_churn": 5 / step} if step > 10 else {}
            evaluation = {"val/loss": loss + 0.1, "val/bits_per_byte": loss / 2, **churn}
            records.append({"step": step, **evaluation})
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    result = {
        "command": "train",
        "exit": 0,
        "steps": steps,
        "tokens": 1000 * steps,
        "val_loss": records[-1].get("val/loss"),
        "tokens_per_second": 5000.0,
        "world_size": 2,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def make_trace(folder: Path, *, step: int = 20, ranks: int = 2) -> None:
    """Write the traces of a step: two tasks on two lanes of each rank, and a prediction."""
    (folder / "trace").mkdir()
    names = {0: "measured", 1: "predicted"}
    for rank in range(ranks):
        events: list[dict[str, Any]] = []
        for pid, name in names.items():
            events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
            for tid, lane in enumerate(("compute", "intra", "inter")):
                head = {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name"}
                events.append({**head, "args": {"name": lane}})
            for tid, task, start in ((0, "layers.0.experts:0", 0.0), (2, "layers.0.send:0", 500.0)):
                span = {"ph": "X", "pid": pid, "tid": tid, "name": task, "ts": start, "dur": 400.0}
                events.append(span)
        path = folder / "trace" / f"step_{step}_rank_{rank}.json"
        path.write_text(json.dumps({"traceEvents": events}))


def make_compression(folder: Path, *, bits: float = 2.5, delta: float = 0.01) -> None:
    """Write what a compression with so many bits leaves."""
    (folder / "compressed").mkdir(parents=True)
    result = {
        "command": "compress",
        "exit": 0,
        "bits": {"paper": bits, "experts": bits - 0.25, "all_parameters": 7.0},
        "bytes": {"experts": 100_000, "experts_bf16": 600_000, "on_disk": 400_000},
        "evaluation": {
            "loss_before": 4.0,
            "loss_after": 4.0 + delta,
            "delta_nats": delta,
            "standard_error": 0.001,
            "accuracy_before": 0.3,
            "accuracy_after": 0.29,
        },
    }
    (folder / "result.json").write_text(json.dumps(result))
    report = {"widths": {"by_layer": {"0": [2, 3, 2, 1], "1": [2, 2, 2, 2]}}}
    (folder / "compressed" / "report.json").write_text(json.dumps(report))
