"""Which experts deserve the bits? Ways to allocate widths, compared on the same checkpoints.

    python benchmarks/compression.py run reference:0=RUN unbalanced:0=RUN [...]
    python benchmarks/compression.py report     compression.json, the tables and the pictures

A model is named LABEL:SEED=RUN, where RUN is the folder of a `gatewise train` run. Its statistics
are measured once, by `gatewise compress`, and every method allocates from them; then each plan is
quantised, packed and evaluated by the same command. Each result is a line in `compression.jsonl`;
what is there already is not done again.

Written down before any run
---------------------------
Question: at equal bits over the experts, how much validation loss does each allocation cost?

Methods: `uniform` at 1, 2 and 3 bits; `random` (3 deals), `frequency`, `pmq_release`, `pmq_paper`,
`fnorm2` (per block), `fisher_block` and `fisher_global` at 1.5, 2.0 and 2.5 bits over the experts;
`random` and `frequency` deal out the widths of `pmq_release`. Attention stays as it is, so that the
experts alone are compared (see below); everything else is the command's default: GPTQ, groups of
128, widths 1, 2 and 3.

Pruning: `fisher_global` at 2.54 bits as MC-MoE's paper counts them (codes over experts and
attention), alone and with two rules on top: `budget`, one threshold per layer so that 84 % of the
expert activations of the calibration tokens stay, and `ratio` as in the paper, medians of each
layer and protection of 2 % of the tokens by columns of attention.

Calibration: 64 sequences of the training files. Evaluation: the first 65,536 targets of the
validation files, the same windows before and after; standard errors are those of paired
differences over windows. Nothing is chosen by looking at validation files.

Expected beforehand: `fisher_global` loses at most half of what `pmq_release` loses at each of the
three budgets, and at 2.0 no more than `uniform` at 2. At 2.54 bits the experts are 5 times smaller
than as bf16, or more, top-1 accuracy falls by at most 3.8 % of itself, and `budget` leaves out at
least 15 % of the activated expert parameters for at most another 0.6 %.

Changed after a first run
-------------------------
With attention at 4 bits, the command's default, one and the same loss was added to every method's,
and at 2.5 bits it was most of what was measured (`compression.md` has that run's losses). Since
then attention keeps its numbers where allocations are compared.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recorded import append_record, fill_page, read_records

__all__ = [
    "METHODS",
    "PRUNED",
    "Cell",
    "Model",
    "cells",
    "difference",
    "loss_of",
    "main",
    "parse_model",
    "report",
]

HERE = Path(__file__).parent
BITS = (1.5, 2.0, 2.5)
METHODS: dict[str, tuple[float, ...]] = {
    "uniform": (1.0, 2.0, 3.0),
    **dict.fromkeys(
        (
            "random",
            "frequency",
            "pmq_release",
            "pmq_paper",
            "fnorm2",
            "fisher_block",
            "fisher_global",
        ),
        BITS,
    ),
}
DEALS = 3  # of the random allocation
TOKENS = 65536
PAPER_BITS = 2.54  # as the paper counts; where pruning is tried
PRUNED: dict[str, tuple[str, ...]] = {
    "budget": ("prune=budget", "prune.keep=0.84"),
    "ratio": ("prune=ratio", "prune.protect=col"),
}


@dataclass(frozen=True, slots=True)
class Model:
    """A trained checkpoint."""

    label: str
    seed: int
    folder: Path


def parse_model(text: str) -> Model:
    """Read LABEL:SEED=RUN."""
    name, equals, folder = text.partition("=")
    label, colon, seed = name.partition(":")
    if not (equals and colon and label and folder and seed.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL:SEED=RUN")
    return Model(label, int(seed), Path(folder))


@dataclass(frozen=True, slots=True)
class Cell:
    """One compression of a model."""

    method: str
    bits: float
    deal: int = 0
    prune: str | None = None

    def settings(self) -> list[str]:
        """Return the command's settings."""
        budget = "experts" if self.prune is None else "paper"
        return [
            f"allocation={self.method}",
            f"bits={self.bits}",
            f"budget={budget}",
            f"seed={self.deal}",
            f"text.tokens={TOKENS}",
            *(("attention_bits=16",) if self.prune is None else PRUNED[self.prune]),
        ]


def cells() -> list[Cell]:
    """Return all compressions of one model."""
    found = [
        Cell(method, bits, deal)
        for method, budgets in METHODS.items()
        for bits in budgets
        for deal in range(DEALS if method == "random" else 1)
    ]
    return found + [Cell("fisher_global", PAPER_BITS, 0, rule) for rule in PRUNED]


def run_missing(output: Path, model: Model) -> None:
    """Compress one model in all ways that are not recorded yet."""
    done = {
        Cell(row["method"], row["bits_target"], row["deal"], row["prune"])
        for row in read_records(output)
        if (row["model"], row["model_seed"]) == (model.label, model.seed)
    }
    left = [cell for cell in cells() if cell not in done]
    # Fisher costs first: they measure all that the others allocate from; `uniform` needs nothing
    left.sort(key=lambda cell: (not cell.method.startswith("fisher"), cell.method == "uniform"))
    with tempfile.TemporaryDirectory() as scratch:
        measured = quantised = None
        for number, cell in enumerate(left):
            began = time.monotonic()
            folder = Path(scratch) / str(number)
            _take_over(folder, measured, quantised if cell.prune else None)
            _compress(model, cell, folder)
            row = _row(model, cell, folder)
            append_record(output, row)
            if measured is None:
                measured = folder
            if cell.prune and quantised is None:
                quantised = folder
            for used in Path(scratch).iterdir():
                if used not in {measured, quantised}:
                    shutil.rmtree(used)
            print(
                f"{model.label}:{model.seed} {number + 1}/{len(left)} {cell.method} {cell.bits:g}"
                f"{'' if cell.prune is None else ' ' + cell.prune}: {row['delta_nats']:+.4f} +- "
                f"{row['standard_error']:.4f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )


def _compress(model: Model, cell: Cell, folder: Path) -> None:
    from gatewise.launch.cli import main as gatewise

    words = ["compress", f"checkpoint={model.folder}", *cell.settings(), f"run.dir={folder}"]
    if gatewise(words):
        raise RuntimeError(f"`gatewise {' '.join(words)}` failed; its message is above")


def _take_over(folder: Path, measured: Path | None, quantised: Path | None) -> None:
    """Give a run what earlier ones measured, so that it goes on behind that.

    Statistics and the scores of the uncompressed model do not depend on what is allocated; blocks
    that were quantised by the same plan do not depend on pruning.
    """
    calibration = folder / "calibration"
    calibration.mkdir(parents=True)
    if measured is not None:
        for pattern in ("sequences.json", "layer_*.json", "before.json"):
            for file in (measured / "calibration").glob(pattern):
                shutil.copyfile(file, calibration / file.name)
    if quantised is not None:
        for file in (quantised / "calibration").glob("quantized_*.json"):
            shutil.copyfile(file, calibration / file.name)
        partial = folder / ".compressed.partial"
        partial.mkdir()
        for file in (quantised / "compressed").glob("model-*"):
            shutil.copyfile(file, partial / file.name)


def _row(model: Model, cell: Cell, folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "compressed" / "report.json").read_bytes())
    before, after = (
        json.loads((folder / "calibration" / name).read_bytes())["nats_W"]
        for name in ("before.json", "after.json")
    )
    sizes, scores = found["bytes"], found["evaluation"]
    row = {
        "model": model.label,
        "model_seed": model.seed,
        "method": cell.method,
        "bits_target": cell.bits,
        "deal": cell.deal,
        "prune": cell.prune,
        "bits_paper_experts": found["bits"]["experts"],
        "bits_paper": found["bits"]["paper"],
        "bits_with_metadata": found["bits"]["with_metadata"],
        "bytes": sizes["on_disk"],
        "experts_smaller_than_bf16": sizes["experts_bf16"] / sizes["experts"],
        "loss_before": scores["loss_before"],
        "delta_nats": scores["delta_nats"],
        "standard_error": scores["standard_error"],
        "accuracy_before": scores["accuracy_before"],
        "accuracy_after": scores["accuracy_after"],
        "accuracy_loss_relative": scores["accuracy_loss_relative"],
        "accuracy_standard_error": scores["accuracy_standard_error"],
        "tokens": scores["tokens"],
    }
    if cell.prune is not None:
        pruned = scores["pruned"]
        row |= {
            "kept_activations": pruned["kept_activations"],
            "pruned_delta_nats": pruned["delta_nats"],
            "pruned_standard_error": pruned["standard_error"],
            "pruned_accuracy": pruned["accuracy"],
            "pruned_accuracy_loss_relative": pruned["accuracy_loss_relative"],
            "pruned_accuracy_standard_error": pruned["accuracy_standard_error"],
        }
    row["moved_nats"] = [round(b - a, 3) for a, b in zip(before, after, strict=True)]
    return row


def loss_of(
    rows: Sequence[Mapping[str, Any]], method: str, bits: float
) -> tuple[float, float] | None:
    """Return the mean loss over deals, and its standard error; None where nothing is recorded."""
    found = [row for row in rows if row["method"] == method and row["bits_target"] == bits]
    if not found:
        return None
    deltas = [float(row["delta_nats"]) for row in found]
    error = statistics.mean(float(row["standard_error"]) for row in found)
    if len(deltas) > 1:
        error = max(error, statistics.stdev(deltas))
    return statistics.mean(deltas), error


def difference(
    rows: Sequence[Mapping[str, Any]], ours: str, theirs: str, bits: float, share: float = 1.0
) -> tuple[float, float] | None:
    """Return ours less a share of theirs in nats per token, and its standard error over windows.

    Deals are averaged window by window; None where nothing is recorded.
    """
    sums = []
    for method in (ours, theirs):
        found = [row for row in rows if (row["method"], row["bits_target"]) == (method, bits)]
        if not found:
            return None
        windows = zip(*(row["moved_nats"] for row in found), strict=True)
        sums.append([statistics.mean(moved) for moved in windows])
    moved = [a - share * b for a, b in zip(*sums, strict=True)]
    tokens = rows[0]["tokens"]
    return sum(moved) / tokens, statistics.stdev(moved) * math.sqrt(len(moved)) / tokens


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables as Markdown, a section per model, after the pictures."""
    plain = [row for row in rows if row["prune"] is None]
    parts = [
        f"![Added loss against bits: {label}](compression_{label}.svg)"
        for label in sorted({row["model"] for row in plain})
    ]
    for label, seed in sorted({(row["model"], row["model_seed"]) for row in plain}):
        mine = [row for row in plain if (row["model"], row["model_seed"]) == (label, seed)]
        lines = [
            f"**{label}, seed {seed}** (loss {mine[0]['loss_before']:.4f} nats per token)",
            "",
            "| method | " + " | ".join(f"{bits:g} bits" for bits in (1.0, *BITS, 3.0)) + " |",
            "| " + " | ".join(["---"] * (len(BITS) + 3)) + " |",
        ]
        for method in METHODS:
            found = [_cell(loss_of(mine, method, bits)) for bits in (1.0, *BITS, 3.0)]
            lines.append(f"| `{method}` | " + " | ".join(found) + " |")
        parts += ["\n".join(lines), "\n".join(_verdicts(mine))]
    pruned = [row for row in rows if row["prune"] is not None]
    if pruned:
        parts.append(_pruned_table(pruned))
    return "\n\n".join(parts)


def _pruned_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what pruning on top of `fisher_global` leaves, a line per model and rule."""
    lines = [
        f"`fisher_global` at {PAPER_BITS:g} bits as the paper counts, and pruning on top:",
        "",
        "| model | experts smaller than bf16 | top-1 before | after | lost of it | pruning | "
        "activations left out | lost of it, more |",
        "| " + " | ".join(["---"] * 8) + " |",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], row["model_seed"], row["prune"])):
        cells = [
            f"{row['model']}, seed {row['model_seed']}",
            f"{row['experts_smaller_than_bf16']:.2f} times",
            f"{row['accuracy_before']:.4f}",
            f"{row['accuracy_after']:.4f}",
            _percent(row, "accuracy"),
            f"`{row['prune']}`",
            f"{100 * (1 - row['kept_activations']):.1f} %",
            _percent(row, "pruned_accuracy"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(row: Mapping[str, Any], name: str) -> str:
    loss, error = row[f"{name}_loss_relative"], row[f"{name}_standard_error"]
    return f"{100 * loss:.2f} % ({100 * error:.2f})"


def _cell(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.4f} ({found[1]:.4f})"


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hold what was expected against what was found."""
    lines = []
    for bits in BITS:
        ours, theirs = loss_of(rows, "fisher_global", bits), loss_of(rows, "pmq_release", bits)
        half = difference(rows, "fisher_global", "pmq_release", bits, share=0.5)
        # no expert has more than 3 bits, so an allocation can hardly lose less than 3 everywhere
        least = loss_of(rows, "uniform", 3.0)
        if ours is not None and theirs is not None and half is not None and least is not None:
            lines.append(
                f"- {bits:g} bits: `fisher_global` loses {ours[0] / theirs[0]:.2f} of what "
                f"`pmq_release` loses; less half of that it is {half[0]:+.4f} ({half[1]:.4f}); "
                f"with 3 bits everywhere, at {3 / bits:.1f} times the size, "
                f"{least[0] / theirs[0]:.2f} would be left"
            )
    even = difference(rows, "fisher_global", "uniform", 2.0)
    if even is not None:
        lines.append(
            f"- 2 bits: `fisher_global` less `uniform` is {even[0]:+.4f} ({even[1]:.4f}) nats per "
            "token"
        )
    return lines


def _picture(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    """Draw loss against bits with metadata, each method the mean over a label's seeds."""
    from gatewise.launch.pictures import Series, scatter

    series = []
    for method, budgets in METHODS.items():
        points = []
        for bits in budgets:
            mine = [row for row in rows if row["method"] == method and row["bits_target"] == bits]
            found = loss_of(mine, method, bits)
            if found is not None and found[0] > 0:
                honest = statistics.mean(float(row["bits_with_metadata"]) for row in mine)
                points.append((honest, found[0], min(found[1], 0.9 * found[0])))
        if points:
            series.append(Series(method, points))
    return scatter(
        f"Loss by allocation: {label}",
        series,
        x_label="bits per weight, with scales and zeros",
        y_label="added loss, nats per token",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=Path, default=HERE / "compression.jsonl")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="compress in the ways that are missing")
    run.add_argument("models", nargs="+", type=parse_model, metavar="LABEL:SEED=RUN")
    commands.add_parser("report", help="compare what is recorded")
    options = parser.parse_args(arguments)
    records: Path = options.records
    if options.command == "run":
        for model in options.models:
            run_missing(records, model)
        return 0
    rows = read_records(records)
    if not rows:
        parser.exit(2, f"{parser.prog}: error: {records} holds no results; `run` comes first\n")
    text = report(rows)
    short = [{key: row[key] for key in row if key != "moved_nats"} for row in rows]
    content = {
        "rows": [row for row in short if row["prune"] is None],
        "pruned": [row for row in short if row["prune"] is not None],
    }
    records.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plain = [row for row in rows if row["prune"] is None]
    for label in sorted({row["model"] for row in plain}):
        mine = [row for row in plain if row["model"] == label]
        picture = records.with_name(f"{records.stem}_{label}.svg")
        picture.write_text(_picture(mine, label), encoding="utf-8")
    fill_page(records.with_suffix(".md"), "compression.py", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
