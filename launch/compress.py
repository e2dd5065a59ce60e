"""`gatewise compress`: a checkpoint with its experts at a few bits."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.compression.config import CompressConfig
from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.run_folder import RunFolder
from gatewise.launch.session import EXIT_REQUEUE, run_session
from gatewise.launch.tracking import track_outcome
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import ConfigError

if TYPE_CHECKING:
    from gatewise.launch.restore import Stored  # imports torch

__all__ = ["StageProgress", "comparison_table", "run", "tracked_numbers", "usage"]

_SUMMARY = """Quantise a Mixture-of-Experts checkpoint: exact bit allocation, GPTQ, packing.
checkpoint=PATH is a run's folder, its checkpoints folder or one step. A killed run goes on when the
same command is started again. `evaluate` and `generate` take the run's folder as a checkpoint."""


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    del arguments
    return usage_text("compress checkpoint=PATH bits=NUMBER", _SUMMARY, field_table(CompressConfig))


def run(arguments: Sequence[str]) -> int:
    """Compress as the command line says and return the exit code."""
    config = load_settings(CompressConfig, arguments)
    if config.checkpoint is None:
        raise ConfigError("checkpoint is not set; give checkpoint=PATH, a run's folder or a step")
    from gatewise.launch.restore import open_checkpoint

    stored = open_checkpoint(config.checkpoint)
    if stored.is_compressed:
        raise ConfigError(
            f"checkpoint is {config.checkpoint!r}, which is compressed; compress the run that it "
            "was made from"
        )
    folder = RunFolder.choose(config.run.dir, "compress")
    if (folder.path / "checkpoints").exists():
        raise ConfigError(
            f"run.dir is {folder.path}, which is a training run; choose another folder, such as "
            f"{folder.path / 'compressed'}"
        )
    _claim(folder, config, stored)
    folder.write_environment(sys.argv)
    return run_session(
        "compress",
        folder,
        lambda: _compress(config, stored, folder.path),
        interrupt_exit=EXIT_REQUEUE,  # every finished layer is saved
    )


class StageProgress:
    """One line per stage that ends, and at most one a second within it, with the time left."""

    def __init__(self) -> None:
        self._stage = ""
        self._began = self._shown = time.monotonic()
        self._first = 0
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note of a finished step."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, self._shown_last(now), done - 1
        self.seconds[stage] = round(now - self._began, 3)
        if done < total and now - self._shown < 1:
            return
        self._shown = now
        line = f"{stage} {done}/{total}"
        if done < total:
            left = (now - self._began) / max(done - self._first, 1) * (total - done)
            line += f", {left:.0f} s left"
        else:
            line += f", {self.seconds[stage]:.1f} s"
        print(line, flush=True)

    def _shown_last(self, now: float) -> float:
        """Return when the stage before ended: a stage's first report comes after its first step."""
        return min(self._shown, now)


def _claim(folder: RunFolder, config: CompressConfig, stored: "Stored") -> None:
    """Write the settings into the folder; refuse a folder where others have calibrated already."""
    from omegaconf import OmegaConf

    source = replace(config, checkpoint=str(stored.path))
    text = OmegaConf.to_yaml(OmegaConf.structured(source))
    file = folder.path / "config.yaml"
    if file.exists() and (folder.path / "calibration").exists():
        before, now = file.read_text(encoding="utf-8").splitlines(), text.splitlines()
        for old, new in zip(before, now, strict=False):
            if old != new and not old.strip().startswith("dir:"):
                raise ConfigError(
                    f"run.dir is {folder.path}, which holds a compression with {old.strip()!r}, "
                    f"not {new.strip()!r}; choose another run.dir"
                )
    folder.write_config(text)


def _compress(config: CompressConfig, stored: "Stored", folder: Path) -> Mapping[str, Any]:
    import json

    from omegaconf import OmegaConf

    from gatewise.compression.artefact import ARTEFACT, is_artefact, verify_artefact
    from gatewise.compression.pipeline import compress
    from gatewise.compression.work import Source
    from gatewise.launch.restore import restore_data
    from gatewise.launch.world import threads_per_rank
    from gatewise.parallel.config import ParallelConfig
    from gatewise.parallel.runtime import running

    path = folder / ARTEFACT
    progress = StageProgress()
    if is_artefact(path):
        verify_artefact(path)
        report = json.loads((path / "report.json").read_bytes())
    else:
        if config.text.path is not None:
            text = replace(stored.config.data, path=config.text.path, hf=None)
            stored = replace(stored, config=replace(stored.config, data=text))
        data = restore_data(stored, folder)
        threads = threads_per_rank(None, 1, os.environ)
        with running(ParallelConfig(threads=threads)) as runtime:
            source = Source(stored.path, stored.config, stored.meta, data, runtime.device)
            path, report = compress(source, config, folder, progress)
    _show(report)
    settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(settings, dict)
    track_outcome(
        "compress",
        stored.config.wandb,
        folder,
        {str(key): value for key, value in settings.items()},
        tracked_numbers(report),
        step=stored.step,
    )
    return {
        "checkpoint": str(stored.path),
        "compressed": str(path),
        "bits": report["bits"],
        "bytes": report["bytes"],
        "evaluation": report.get("evaluation"),
        "prune": report.get("prune"),
        "repair": report.get("repair"),
        "stage_seconds": progress.seconds,
    }


def _show(report: Mapping[str, Any]) -> None:
    """Print what became of the model: widths and bits, then a table of before and after."""
    bits = report["bits"]
    counts = ", ".join(f"{count} at {width}" for width, count in report["widths"]["all"].items())
    print(f"experts' matrices: {counts} bits")
    print(
        f"bits: {bits['experts']:.3f} experts, {bits['paper']:.3f} paper, "
        f"{bits['with_metadata']:.3f} with metadata, {bits['all_parameters']:.3f} all parameters"
    )
    for row in report["coverage"]:
        if row["below_target"]:
            print(
                f"layer {row['layer']}: {len(row['below_target'])} experts saw fewer than "
                f"{row['target']} calibration tokens"
            )
    print("\n".join(comparison_table(report)))
    if "prune" in report:
        _show_pruning(report)


def tracked_numbers(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a compression by the names they have in W&B."""
    bits, sizes = report["bits"], report["bytes"]
    numbers = {
        "compress/bits_experts": bits["experts"],
        "compress/bits_paper": bits["paper"],
        "compress/bits_all": bits["all_parameters"],
        "compress/experts_bytes": sizes["experts"],
        "compress/disk_bytes": sizes["on_disk"],
    }
    found = report.get("evaluation")
    if found is not None:
        names = ("loss_before", "loss_after", "delta_nats")
        numbers |= {f"compress/{name}": found[name] for name in names}
    return numbers


def comparison_table(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of before and after."""
    sizes, found = report["bytes"], report.get("evaluation")
    ratio = sizes["experts_bf16"] / sizes["experts"]
    rows = [("", "before", "after", "")]
    if found is not None:
        delta, error = found["delta_nats"], found["standard_error"]
        rows += [
            (
                "validation loss (nats per token)",
                f"{found['loss_before']:.4f}",
                f"{found['loss_after']:.4f}",
                f"{delta:+.4f} +- {error:.4f}",
            ),
            (
                "top-1 accuracy",
                f"{found['accuracy_before']:.4f}",
                f"{found['accuracy_after']:.4f}",
                f"{-100 * found['accuracy_loss_relative']:+.2f} %",
            ),
        ]
    rows += [
        (
            "experts (bytes; before: as bf16)",
            f"{sizes['experts_bf16']:,}",
            f"{sizes['experts']:,}",
            f"{ratio:.2f} times smaller",
        ),
        ("all tensors (bytes)", "", f"{sizes['on_disk']:,}", ""),
    ]
    return [
        f"{name:<34}{before:>12}{after:>12}   {note}".rstrip() for name, before, after, note in rows
    ]


def _show_pruning(report: Mapping[str, Any]) -> None:
    prune, bits = report["prune"], report["bits"]
    print(
        f"pruned by {prune['rule']}: {100 * prune['kept_activations']:.1f} % of activations kept "
        f"on calibration; a token reads {prune['activated_bytes_per_token']:,.0f} bytes, without "
        f"pruning {bits['activated_bytes_per_token']:,.0f}"
    )
    if "evaluation" in report:
        found = report["evaluation"]["pruned"]
        print(
            f"validation loss pruned: {found['loss']:.4f} ({found['delta_nats']:+.4f} +- "
            f"{found['standard_error']:.4f} nats per token over unpruned), top-1 accuracy "
            f"{found['accuracy']:.4f}, {100 * found['kept_activations']:.1f} % of activations kept"
        )
