"""Time whole training steps on emulated nodes: our schedules beside DeepSpeed's MoE layers.

    python benchmarks/training_peers.py --links 400/1600 --trials 20 --output training_peers.json

Needs root (network namespaces) and DeepSpeed with ninja and a C++ compiler; without DeepSpeed only
our schedules are compared, with `--loopback` no namespaces are made. Every candidate trains a model
of its own of the same sizes on the same text, with AdamW in fp32: forward, backward, gradient sums,
clipping and update. Ours are the trainer's steps; costs are measured by the ranks themselves, once,
and each policy plans from them. `deepspeed` is the same decoder with `deepspeed.moe.layer.MoE`
under DeepSpeed's engine (ZeRO stage 0), dropless as ours are; `deepspeed_drop` has capacity factor
1. Candidates take turns in every trial (A B C, C B A, ...); a step lasts as long as on its slowest
rank. Prints a table and writes all times, and what a step took of the processors, over all ranks:
divided by the cores that is the least it can last. With `--device-gmacs` the experts of all
candidates sleep instead of computing (`emulated_experts.py`), as on devices of their own.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from emulated_experts import SleepingFeedForward, emulate_experts
from torch import Tensor, nn

from gatewise.launch.bench_schedule import parse_links
from gatewise.launch.machine import cpu_model
from gatewise.launch.spawn import run_ranks
from gatewise.launch.testbed import PORT, Testbed, enter_node
from gatewise.launch.trials import median_interval, paired_speedup, trial_orders
from gatewise.launch.world import Place
from gatewise.moe.config import ModelConfig
from gatewise.moe.feed_forward import FeedForward
from gatewise.moe.model import Decoder
from gatewise.moe.parallelize import build_model
from gatewise.parallel.collectives import NO_GROUP
from gatewise.parallel.config import ParallelConfig
from gatewise.parallel.dims import make_groups
from gatewise.parallel.runtime import Runtime, keep_freed_memory
from gatewise.parallel.schedule.lanes import ThreadLanes
from gatewise.parallel.schedule.profiles import write_profile
from gatewise.routers.api import RoutingContext
from gatewise.training.config import BatchConfig, DataConfig, Precision, TrainConfig
from gatewise.training.data import PreparedData, open_prepared, prepare_data
from gatewise.training.measure_costs import measure_costs
from gatewise.training.schedule_config import ScheduleConfig
from gatewise.training.sequences import SequenceOrder, read_batch
from gatewise.training.step import language_loss
from gatewise.training.trainer import Trainer

RANKS, NODE = 4, 2
_GMACS = "experts sleep as on a device of so many 1e9 multiply-adds a second; 0: they compute"
Step = Callable[[], None]


def settings(options: argparse.Namespace) -> TrainConfig:
    """Return the settings of our runs, without a schedule."""
    return TrainConfig(
        steps=10_000,
        precision=Precision.fp32,
        data=DataConfig(sequence_length=options.length),
        model=ModelConfig(
            layers=options.layers,
            hidden=options.hidden,
            heads=max(1, options.hidden // 64),
            num_experts=options.experts,
            top_k=options.top_k,
            expert_width=options.expert_width,
        ),
        batch=BatchConfig(sequences=options.sequences * RANKS),
        parallel=ParallelConfig(
            ranks=RANKS,
            expert=RANKS // options.expert_shard,
            expert_shard=options.expert_shard,
            node=NODE,
            threads=1,
            timeout=options.timeout,
        ),
    )


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's layer in the place of ours.

    Args:
        config: sizes.
        drops: capacity factor 1 instead of padding to the fullest expert.
        gmacs: of an emulated device on which the experts work; 0: they compute here.
    """

    def __init__(self, config: ModelConfig, *, drops: bool, gmacs: float) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        sizes = (config.hidden, config.expert_width, config.activation)
        expert = FeedForward(*sizes)
        if gmacs:
            expert = SleepingFeedForward(*sizes)
            each = sum(weight.numel() for weight in expert.parameters())
            expert.seconds_per_row = each / (gmacs * 1e9)
        self.layer = MoE(
            hidden_size=config.hidden,
            expert=expert,
            num_experts=config.num_experts,
            ep_size=RANKS,
            k=config.top_k,
            drop_tokens=drops,
            capacity_factor=1.0,
            min_capacity=1,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.balance: Tensor | None = None  # loss of the last call

    def forward(
        self, x_TD: Tensor, context: RoutingContext, _layer: int, _tickets: None
    ) -> tuple[Tensor, None, RoutingContext]:
        """Return what the decoder expects of a layer of experts, without its routing."""
        y_TD, self.balance, _ = self.layer(x_TD)
        return y_TD, None, context


def deepspeed_step(
    config: TrainConfig, data: PreparedData, rank: int, *, drops: bool, gmacs: float
) -> Step:
    """Return a training step of the decoder with DeepSpeed's layers and engine."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    sizes = dataclasses.replace(config.model, num_experts=0)
    model: Decoder = build_model(
        sizes,
        config.router,
        vocab_size=data.tokenizer.vocab_size,
        group=NO_GROUP,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=config.seed,
    )
    layers = []
    for block in model.blocks:
        layers.append(DeepSpeedLayer(config.model, drops=drops, gmacs=gmacs))
        block.feed_forward = layers[-1]
    optim = config.optim
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, fused=True)
    share = config.batch.sequences // RANKS
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": config.batch.sequences,
            "train_micro_batch_size_per_gpu": share,
            "gradient_clipping": optim.clip,
            "zero_optimization": {"stage": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    order = SequenceOrder(len(data.train.tokens), config.data.sequence_length, config.seed)
    first = 0

    def step() -> None:
        nonlocal first
        start = first + rank * share
        token_BS = read_batch(data.train, order, range(start, start + share))
        first += config.batch.sequences
        output = engine(token_BS[:, :-1], RoutingContext())
        target_BS = token_BS[:, 1:]
        loss = language_loss(model, output, target_BS) / target_BS.numel()
        balance = [layer.balance for layer in layers if layer.balance is not None]
        engine.backward(loss + 0.01 * torch.stack(balance).sum())
        engine.step()

    return step


def our_step(trainer: Trainer) -> Step:
    """Return a training step of our trainer."""
    trainer.model.train()

    def step() -> None:
        float(trainer.run_step().loss)  # reading it ends the step

    return step


def bench_rank(
    place: Place, options: argparse.Namespace, nodes: tuple[str, ...], folders: tuple[Path, Path]
) -> dict[str, Any]:
    """Be one rank: build all candidates and run them in turns."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.device_gmacs:
        emulate_experts(options.device_gmacs)
    if nodes:
        enter_node(nodes[place.rank // NODE])
        os.environ["GLOO_SOCKET_IFNAME"] = PORT  # a node's own address is reached over its lo
    names = {"RANK": place.rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": place.rank % NODE}
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group(
        "gloo",
        init_method=place.init_method,
        rank=place.rank,
        world_size=RANKS,
        timeout=timedelta(seconds=options.timeout),
    )
    config, (data_folder, folder) = settings(options), folders
    data = open_prepared(data_folder)
    runtime = Runtime(place.rank, RANKS, torch.device("cpu"), make_groups(config.parallel))

    def trainer(schedule: ScheduleConfig, name: str) -> Trainer:
        point = dataclasses.replace(config, schedule=schedule)
        return Trainer(point, runtime, data, folder / name, [])

    serial = trainer(ScheduleConfig(), "serial")
    steps, plans = {"serial": our_step(serial)}, {"serial": "serial"}
    lanes = ThreadLanes()
    profile = measure_costs(
        serial.model, config, runtime, lanes, dtype=torch.float32, source="benchmark"
    )
    lanes.close()
    path = folder / "profile.json"
    if place.rank == 0:
        write_profile(profile, path)
    dist.barrier()
    for policy in options.policies.split(",") if options.policies else ():
        asked = ScheduleConfig(policy=policy, profile=str(path), refit=None)
        made = trainer(asked, policy)
        steps[policy], plans[policy] = our_step(made), str(made.lanes.plan)
    for count in options.parts.split(",") if options.parts else ():
        asked = ScheduleConfig(policy="whole_block", chunks_forward=int(count))
        made = trainer(asked, f"whole_block_{count}")
        steps[f"whole_block_{count}"] = our_step(made)
        plans[f"whole_block_{count}"] = str(made.lanes.plan)
    for name in options.peers.split(",") if options.peers else ():
        drops = name == "deepspeed_drop"
        peer = deepspeed_step(config, data, place.rank, drops=drops, gmacs=options.device_gmacs)
        steps[name] = peer
    return {"plans": plans, **take_turns(steps, options.trials, rank=place.rank)}


def take_turns(steps: dict[str, Step], trials: int, *, rank: int) -> dict[str, Any]:
    """Run all candidates in turns; times are of the slowest rank, processors' of all."""
    ms: dict[str, list[float]] = {name: [] for name in steps}
    cores: dict[str, list[float]] = {name: [] for name in steps}
    loads = []
    order_of = list(steps)
    for trial, order in enumerate(trial_orders(len(steps), trials + 1)):
        for index in order:
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            steps[order_of[index]]()
            took = torch.tensor(1e3 * (time.perf_counter() - began), dtype=torch.float64)
            busy = torch.tensor(1e3 * (time.process_time() - used), dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            dist.all_reduce(busy)
            if trial:  # the first one warms up
                ms[order_of[index]].append(float(took))
                cores[order_of[index]].append(float(busy))
        loads.append(os.getloadavg()[0])
        if rank == 0:
            print(f"trial {trial} of {trials}", flush=True)
    return {"ms": ms, "processor_ms": cores, "loads": loads}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--links", default="400/1600", help="Mbit/s between nodes / within one")
    parser.add_argument("--loopback", action="store_true", help="no namespaces, no links")
    parser.add_argument("--policies", default="tutel,fsmoe,search,auto", help="empty: none")
    parser.add_argument("--parts", default="2,4", help="of whole_block; empty: none")
    parser.add_argument("--peers", default="deepspeed,deepspeed_drop", help="empty: none")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--expert-width", type=int, default=512)
    parser.add_argument("--expert-shard", type=int, default=1, help="2: a node splits each expert")
    parser.add_argument("--device-gmacs", type=float, default=0.0, help=_GMACS)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=4, help="of a rank")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--output", type=Path, help="file for all times, as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Run the comparison and print it."""
    options = parse(arguments)
    data = prepare_data(settings(options).data)
    (links,) = parse_links(options.links)
    testbed = None if options.loopback else Testbed(RANKS // NODE, links)
    with testbed or nullcontext(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "logs").mkdir()
        outcomes = run_ranks(
            bench_rank,
            RANKS,
            (options, testbed.names if testbed else (), (data.folder, folder)),
            threads=1,
            logs=folder / "logs",
        )
    result = dict(outcomes[0].result or {})
    serial = result["ms"]["serial"]
    rows = []
    for name, times in result["ms"].items():
        middle, low, high = median_interval(times)
        row = {"name": name, "step_ms": middle, "ci95_ms": [low, high], "trials_ms": times}
        row["speedup_vs_serial"] = list(paired_speedup(serial, times))
        row["processor_ms"] = statistics.median(result["processor_ms"][name])
        row["plan"] = result["plans"].get(name, "")
        rows.append(row)
        print(
            f"{name:<16}{middle:9.1f} ms ({low:.1f}-{high:.1f}; "
            f"{row['processor_ms']:.0f} of processors)   "
            "{:.2f} ({:.2f}-{:.2f}) times serial   ".format(*row["speedup_vs_serial"])
            + row["plan"]
        )
    kept = {
        "settings": {n: str(value) for n, value in vars(options).items() if n != "output"},
        "links": "loopback" if options.loopback else str(links),
        "cpu": cpu_model(),
        "loads": result["loads"],
        "rows": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
