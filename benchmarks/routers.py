"""Does a recurrent router, or one that decides ahead, beat a linear one? A paired experiment.

    python benchmarks/routers.py run            the runs that are missing, one after the other
    python benchmarks/routers.py run --arms linear bias --seeds 0 1
    python benchmarks/routers.py report         routers.json, and the results in routers.md

Each run is one process of one thread and leaves one line in `routers.jsonl`; a run whose line is
there already, with the same settings, is not repeated. Needs scipy (the `dev` extra).

Written down before any run
---------------------------
Question: at equal tokens, does the GRU router (RMoE), or a router that decides before the first
layer, lead to a lower validation loss than a linear router, and is it the recurrence that does it?

Model: 8 layers of width 64, 4 heads, 8 experts of width 32 (SwiGLU), top 2, bytes, sequences of 64;
16 sequences a step, 300 steps (307,200 tokens), AdamW, one learning rate (0.003, cosine) for all.
Text: the default corpus (the interpreter's standard library).

Arms:
    linear             softmax of a linear score, top 2, balance loss 0.01, z-loss 0.001
    linear_parameters  linear, with the expert width (33) whose parameters are nearest to the GRU's
                       from above; `linear` is nearest from below
    linear_arithmetic  linear, with experts so wide (38) that a token costs as much as with the GRU
    np                 the GRU router without recurrence: same parameters and arithmetic as `gru`
    gru                the GRU router of RMoE, state width 16, the same losses
    pregate            one causal block on token ids (width 64) chooses once for all layers, the
                       layers' linear routers weigh what it chose and teach it; the same losses
    gru_pregate        the same with the GRU over layers (state width 16) choosing for each layer
    bias               DeepSeek-V3's: sigmoid scores and a balancing bias, no loss but a small one

Seeds: 0 to 4. A seed fixes the order of the data, alike in all arms, and the starting weights.

Endpoint: loss on the first 65,536 bytes of the validation split after the last step, nats per
byte. No early stopping, no choice among checkpoints, nothing tuned on any arm.

Contrasts, each the mean over seeds of the paired difference, below 0 if the first arm is better:
    gru - linear_arithmetic, gru - linear_parameters   is the GRU worth its cost
    gru - np                                           is it the recurrence
    pregate - linear, gru_pregate - gru                what deciding ahead costs
    bias - linear                                      balance by bias or by loss
with two-sided t intervals of 95 %, p-values adjusted by Holm over the six, and the number of seeds
in which the first arm was better. A difference is claimed only if its adjusted p is below 0.05.

Beside it, without tests, so that a null can be read: gate entropy, inner and outer balance, max
violation, information between layers' first experts (near and far, less the shuffled baseline).

Expected beforehand: no difference that five seeds could show. The paper reports none at 6 layers,
0.6 % at 12 and 1.7 % at 24, after 250 times as many steps as here.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recorded import append_record, fill_page, read_records

__all__ = ["ARMS", "CONTRASTS", "Contrast", "compare", "holm", "main", "report", "verdict"]

HERE = Path(__file__).parent
SEEDS = (0, 1, 2, 3, 4)
STEPS = 300
COMMON = (
    f"steps={STEPS}",
    "precision=fp32",
    "log_every=50",
    "wandb.mode=off",
    "parallel.threads=1",
    "data.tokenizer=bytes",
    "data.sequence_length=64",
    "model.layers=8",
    "model.hidden=64",
    "model.heads=4",
    "model.num_experts=8",
    "model.top_k=2",
    "batch.sequences=16",
    "optim.lr=0.003",
    "optim.warmup=20",
    "optim.weight_decay=0.05",
    "evaluation.tokens=65536",
    "evaluation.micro=64",
)
PROBE = ("tokens=16384", "history=false")
_LOSSES = ("router.balance_loss=0.01", "router.z_loss=0.001")
ARMS: dict[str, tuple[str, ...]] = {
    "linear": ("router=mixtral", "model.expert_width=32", *_LOSSES),
    "linear_parameters": ("router=mixtral", "model.expert_width=33", *_LOSSES),
    "linear_arithmetic": ("router=mixtral", "model.expert_width=38", *_LOSSES),
    "np": (
        "router=rmoe",
        "router.state_dim=16",
        "router.recurrence=none",
        "model.expert_width=32",
        *_LOSSES,
    ),
    "gru": ("router=rmoe", "router.state_dim=16", "model.expert_width=32", *_LOSSES),
    "pregate": (
        "router=readme_pregate",
        "router.ahead.width=64",
        "model.expert_width=32",
        *_LOSSES,
    ),
    "gru_pregate": (
        "router=gru_pregate",
        "router.ahead.width=64",
        "router.ahead.state=16",
        "model.expert_width=32",
        *_LOSSES,
    ),
    "bias": ("router=deepseek_v3", "model.expert_width=32"),
}
CONTRASTS = (
    ("gru", "linear_arithmetic"),
    ("gru", "linear_parameters"),
    ("gru", "np"),
    ("pregate", "linear"),
    ("gru_pregate", "gru"),
    ("bias", "linear"),
)
_SIDE = (
    ("entropy", "gate entropy"),
    ("inner_balance", "inner balance"),
    ("outer_balance", "outer balance"),
    ("max_violation", "max violation"),
    ("near", "MI near"),
    ("far", "MI far"),
)


@dataclass(frozen=True, slots=True)
class Contrast:
    """One paired comparison; differences are first less second, nats per byte."""

    first: str
    second: str
    seeds: int
    mean: float
    deviation: float  # of the differences over seeds
    low: float  # 95 % interval of the mean
    high: float
    p: float  # two-sided
    p_adjusted: float  # by Holm over all contrasts
    better: int  # seeds in which the first arm had the lower loss


def compare(losses: Mapping[str, Mapping[int, float]]) -> list[Contrast]:
    """Compare the arms of each contrast on the seeds that both have.

    Args:
        losses: by arm, then by seed.

    Returns:
        One entry for each contrast with at least two common seeds.
    """
    from scipy import stats

    found = []
    for first, second in CONTRASTS:
        one, two = losses.get(first, {}), losses.get(second, {})
        differences = [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]
        number = len(differences)
        if number < 2:
            continue
        mean, deviation = statistics.mean(differences), statistics.stdev(differences)
        error = deviation / math.sqrt(number)
        reach = float(stats.t.ppf(0.975, number - 1)) * error
        p = 2 * float(stats.t.sf(abs(mean) / error, number - 1)) if error else float(mean == 0)
        better = sum(difference < 0 for difference in differences)
        found.append(
            Contrast(
                first, second, number, mean, deviation, mean - reach, mean + reach, p, p, better
            )
        )
    adjusted = holm([contrast.p for contrast in found])
    return [
        Contrast(**{**asdict(contrast), "p_adjusted": p})
        for contrast, p in zip(found, adjusted, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def run_missing(output: Path, arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Run what is not recorded, seed by seed, each in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, before they import torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gatewise.training.trainer", "gatewise.launch.analyze"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for seed in seeds:
            for arm in arms:
                if (arm, seed, _settings(arm)) in _keys(read_records(output)):
                    continue
                record = pool.submit(run_one, arm, seed).result()
                append_record(output, record)
                loss, seconds = record["val_loss"], record["cpu_seconds"]
                print(f"{arm} seed {seed}: {loss:.4f}, {seconds:.0f} s", flush=True)


def run_one(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and look at its routers; return the record."""
    from gatewise.launch.cli import main as gatewise

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        where = f"run.dir={folder}/run"
        if gatewise(["train", *COMMON, *ARMS[arm], f"seed={seed}", where]):
            raise RuntimeError(f"{arm}, seed {seed}: training failed; its message is above")
        out = f"run.dir={folder}/analysis"
        if gatewise(["analyze", f"checkpoint={folder}/run", *PROBE, out]):
            raise RuntimeError(f"{arm}, seed {seed}: analysis failed; its message is above")
        trained = json.loads(Path(folder, "run", "result.json").read_text(encoding="utf-8"))
        looked = json.loads(Path(folder, "analysis", "result.json").read_text(encoding="utf-8"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    layers, across = looked["layers"], looked["across_layers"]
    side = {
        name: statistics.mean(layer["scores"][name] for layer in layers)
        for name in ("entropy", "inner_balance", "outer_balance")
    }
    return {
        "arm": arm,
        "seed": seed,
        "settings": _settings(arm),
        **{
            name: trained[name]
            for name in (
                "val_loss",
                "train_loss",
                "steps",
                "tokens",
                "parameters",
                "active_parameters",
                "router_parameters",
                "train_seconds",
            )
        },
        **side,
        "max_violation": statistics.mean(layer["load"]["max_violation"] for layer in layers),
        "near": across["information_near"],
        "far": across["information_far"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def report(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Return the analysis as a dict and its tables as Markdown.

    Args:
        records: of runs; those with other settings than this file's are left out.
    """
    mine = [record for record in records if record["settings"] == _settings(record["arm"])]
    arms = {arm: [r for r in mine if r["arm"] == arm] for arm in ARMS}
    losses = {
        arm: {int(r["seed"]): float(r["val_loss"]) for r in runs} for arm, runs in arms.items()
    }
    contrasts = compare(losses)
    found = {
        "common": list(COMMON),
        "arms": {arm: _summary(runs) for arm, runs in arms.items() if runs},
        "contrasts": [asdict(contrast) for contrast in contrasts],
        "cpu_seconds": sum(record["cpu_seconds"] for record in mine),
    }
    return found, "\n\n".join(
        (
            _arm_table(found["arms"]),
            _contrast_table(contrasts),
            "\n".join(verdict(contrast) for contrast in contrasts),
        )
    )


def verdict(contrast: Contrast) -> str:
    """Say in one line what a contrast shows, by the rule written down."""
    pair = f"- {contrast.first} against {contrast.second}: "
    span = f"between {contrast.low:+.4f} and {contrast.high:+.4f} nats per byte"
    if contrast.p_adjusted >= 0.05:
        return f"{pair}no difference shown; the data fit one {span}."
    word = "better" if contrast.mean < 0 else "worse"
    return f"{pair}{word}, {span} (Holm-adjusted p {contrast.p_adjusted:.3f})."


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [run["val_loss"] for run in runs]
    return {
        "overrides": list(ARMS[runs[0]["arm"]]),
        "seeds": sorted(run["seed"] for run in runs),
        "parameters": runs[0]["parameters"],
        "router_parameters": runs[0]["router_parameters"],
        "val_loss": statistics.mean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        **{name: statistics.mean(run[name] for run in runs) for name, _ in _SIDE},
        "cpu_seconds": statistics.mean(run["cpu_seconds"] for run in runs),
    }


def _arm_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    titles = ["arm", "seeds", "parameters", "of routers", "validation loss (sd)"]
    titles += [title for _, title in _SIDE]
    rows = [
        [
            arm,
            str(len(values["seeds"])),
            f"{values['parameters']:,}",
            f"{values['router_parameters']:,}",
            f"{values['val_loss']:.4f}"
            + ("" if values["deviation"] is None else f" ({values['deviation']:.4f})"),
            *(f"{values[name]:.2f}" for name, _ in _SIDE),
        ]
        for arm, values in arms.items()
    ]
    return _table(titles, rows)


def _contrast_table(contrasts: Sequence[Contrast]) -> str:
    titles = ["contrast", "mean difference", "95 % interval", "p", "p (Holm)", "better in"]
    rows = [
        [
            f"{c.first} - {c.second}",
            f"{c.mean:+.4f}",
            f"[{c.low:+.4f}, {c.high:+.4f}]",
            f"{c.p:.3f}",
            f"{c.p_adjusted:.3f}",
            f"{c.better} of {c.seeds}",
        ]
        for c in contrasts
    ]
    return _table(titles, rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (titles, ["---"] * len(titles), *rows)
    )


def _settings(arm: str) -> str:
    """Name the settings of an arm, so that records of other settings are not mixed with these."""
    text = json.dumps([COMMON, PROBE, ARMS.get(arm)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _keys(records: Sequence[Mapping[str, Any]]) -> set[tuple[str, int, str]]:
    return {(record["arm"], record["seed"], record["settings"]) for record in records}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=Path, default=HERE / "routers.jsonl")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that are missing")
    run.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    run.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    commands.add_parser("report", help="compare what is recorded")
    options = parser.parse_args(arguments)
    if options.command == "run":
        run_missing(options.records, options.arms, options.seeds)
    else:
        found, text = report(read_records(options.records))
        path = options.records.with_suffix(".json")
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        fill_page(options.records.with_suffix(".md"), "routers.py", text)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
