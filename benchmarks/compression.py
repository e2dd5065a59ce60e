"""Which experts deserve the bits? Ways to allocate widths, compared on the same checkpoints.

    python benchmarks/compression.py run reference:0=RUN unbalanced:0=RUN [...]
    python benchmarks/compression.py report     compression.json, the tables and the picture

A model is named LABEL:SEED=RUN, where RUN is the folder of a `gatewise train` run. Its statistics
are measured once, by `gatewise compress`, and every method allocates from them; then each plan is
quantised, packed and evaluated by the same code as the command's. Each result is a line in
`compression.jsonl`; what is there already is not done again.

Written down before any run
---------------------------
Question: at equal bits over the experts, how much validation loss does each allocation cost?

Methods: `uniform` at 1, 2 and 3 bits; `random` (3 deals), `frequency`, `pmq_release`, `pmq_paper`,
`fnorm2` (per block), `fisher_block` and `fisher_global` at 1.5, 2.0 and 2.5 bits over the experts;
`random` and `frequency` deal out the widths of `pmq_release`. Everything else is the command's
default: GPTQ, groups of 128, attention at 4 bits, widths 1, 2 and 3.

Calibration: 64 sequences of the training files. Evaluation: the first 65,536 targets of the
validation files, the same windows before and after; the standard error is that of the paired
difference over windows. Nothing is chosen by looking at validation files.

Expected beforehand: `fisher_global` loses at most half of what `pmq_release` loses at each of the
three budgets, and at 2.0 no more than `uniform` at 2.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recorded import append_record, fill_page, read_records

__all__ = ["METHODS", "Model", "loss_of", "main", "parse_model", "report"]

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


def run_missing(output: Path, model: Model) -> None:
    """Compress one model in all ways that are not recorded yet."""
    done = {
        (row["method"], row["bits_target"], row["deal"])
        for row in read_records(output)
        if (row["model"], row["model_seed"]) == (model.label, model.seed)
    }
    wanted = [
        (method, bits, deal)
        for method, budgets in METHODS.items()
        for bits in budgets
        for deal in range(DEALS if method == "random" else 1)
    ]
    left = [cell for cell in wanted if cell not in done]
    if not left:
        return
    with tempfile.TemporaryDirectory() as scratch:
        first = _compress(model, Path(scratch), "fisher_global", 2.0, 0, None)
        for number, (method, bits, deal) in enumerate(left):
            folder = first
            if (method, bits, deal) != ("fisher_global", 2.0, 0):
                folder = _compress(model, Path(scratch), method, bits, deal, first)
            row = _row(model, method, bits, deal, _report_of(folder))
            append_record(output, row)
            if folder != first:
                shutil.rmtree(folder)
            print(
                f"{model.label}:{model.seed} {number + 1}/{len(left)} {method} {bits:g}: "
                f"{row['delta_nats']:+.4f} +- {row['standard_error']:.4f}",
                flush=True,
            )


def _compress(  # noqa: PLR0917 - a cell of the table, by position
    model: Model, scratch: Path, method: str, bits: float, deal: int, measured: Path | None
) -> Path:
    """Run the command, on the statistics of an earlier run where there is one."""
    from gatewise.launch.cli import main as gatewise

    folder = scratch / f"{method}_{bits:g}_{deal}"
    settings = [
        f"checkpoint={model.folder}",
        f"allocation={method}",
        f"bits={bits}",
        "budget=experts",
        f"seed={deal}",
        f"text.tokens={TOKENS}",
        f"run.dir={folder}",
    ]
    if measured is not None:  # statistics do not depend on what is allocated from them
        target = folder / "calibration"
        target.mkdir(parents=True)
        for pattern in ("sequences.json", "layer_*.json"):
            for file in (measured / "calibration").glob(pattern):
                shutil.copyfile(file, target / file.name)
    if gatewise(["compress", *settings]):
        raise RuntimeError(f"{method} at {bits:g} bits failed; its message is above")
    return folder


def _report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compressed" / "report.json").read_bytes())
    return found


def _row(
    model: Model, method: str, bits: float, deal: int, found: Mapping[str, Any]
) -> dict[str, Any]:
    sizes, scores = found["bytes"], found["evaluation"]
    return {
        "model": model.label,
        "model_seed": model.seed,
        "method": method,
        "bits_target": bits,
        "deal": deal,
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
    }


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


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables as Markdown, a section per model."""
    parts = []
    for label, seed in sorted({(row["model"], row["model_seed"]) for row in rows}):
        mine = [row for row in rows if (row["model"], row["model_seed"]) == (label, seed)]
        lines = [
            f"**{label}, seed {seed}** (loss {mine[0]['loss_before']:.4f} nats per token)",
            "",
            "| method | " + " | ".join(f"{bits:g} bits" for bits in (1.0, *BITS, 3.0)) + " |",
            "| " + " | ".join(["---"] * (len(BITS) + 3)) + " |",
        ]
        for method in METHODS:
            cells = [_cell(loss_of(mine, method, bits)) for bits in (1.0, *BITS, 3.0)]
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
        parts += ["\n".join(lines), "\n".join(_verdicts(mine))]
    return "\n\n".join(parts)


def _cell(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.4f} ({found[1]:.4f})"


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hold what was expected against what was found."""
    lines = []
    for bits in BITS:
        ours, theirs = loss_of(rows, "fisher_global", bits), loss_of(rows, "pmq_release", bits)
        if ours is not None and theirs is not None:
            lines.append(
                f"- {bits:g} bits: `fisher_global` loses {ours[0] / theirs[0]:.2f} of what "
                f"`pmq_release` loses"
            )
    ours, even = loss_of(rows, "fisher_global", 2.0), loss_of(rows, "uniform", 2.0)
    if ours is not None and even is not None:
        lines.append(
            f"- 2 bits: `fisher_global` less `uniform` is {ours[0] - even[0]:+.4f} nats per token"
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
    records.with_suffix(".json").write_text(
        json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    for label in sorted({row["model"] for row in rows}):
        mine = [row for row in rows if row["model"] == label]
        picture = records.with_name(f"{records.stem}_{label}.svg")
        picture.write_text(_picture(mine, label), encoding="utf-8")
    fill_page(records.with_suffix(".md"), "compression.py", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
