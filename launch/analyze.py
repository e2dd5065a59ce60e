"""`gatewise analyze`: what the routers of a checkpoint do on a text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewise.conf.compose import override_config
from gatewise.conf.fields import field_table, split_overrides
from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.session import run_session
from gatewise.launch.usage import usage_text
from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.routers.config import RouterConfig
from gatewise.training.config import RunConfig, TrainConfig

if TYPE_CHECKING:
    import torch

    from gatewise.launch.restore import Stored  # imports torch
    from gatewise.training.data import PreparedData
    from gatewise.training.measures.probe import ProbeText

__all__ = ["AnalyzeConfig", "run", "usage"]

_SECTIONS = ("data", "evaluation", "precision")
_SUMMARY = """Measure the routers of a checkpoint on the validation split of its own text, or of
data.path: load, scores, information between layers, context, experts, gradients, and over the
checkpoints of the run. Writes result.json, report.md and pictures/ into run.dir.
checkpoint=PATH is a run's folder, its checkpoints folder or one step; all other fields keep what
the run was trained with (the defaults below are those of a new run)."""


@dataclass(kw_only=True, slots=True)
class AnalyzeConfig:
    """Fields of the command's own."""

    checkpoint: str | None = None  # a run's folder, its checkpoints folder or one step
    tokens: int = 65536  # of the text, at most
    training_split: bool = False  # look at training text instead of validation text
    history: bool = True  # also compare with the run's earlier checkpoints
    seed: int = 0  # of the shuffled baselines

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens is {self.tokens}; it must be at least 1")


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    table = field_table(AnalyzeConfig) | {
        name: field
        for name, field in field_table(TrainConfig()).items()
        if name == "run.dir" or name.partition(".")[0] in _SECTIONS
    }
    del arguments
    return usage_text("analyze checkpoint=PATH", _SUMMARY, table)


def run(arguments: Sequence[str]) -> int:
    """Analyse as the command line says and return the exit code."""
    own, rest = split_arguments(arguments)
    if own.checkpoint is None:
        raise ConfigError("checkpoint is not set; give checkpoint=PATH, a run's folder or a step")
    from gatewise.launch.restore import open_checkpoint

    stored = open_checkpoint(own.checkpoint)
    if not stored.config.model.moe_layers():
        raise ConfigError(
            f"checkpoint is {own.checkpoint!r}, a dense model (model.num_experts=0), which has no "
            "routers; give a checkpoint of a model with experts"
        )
    config = override_config(
        replace(stored.config, run=RunConfig()), rest, sections=(*_SECTIONS, "run")
    )
    folder = RunFolder.choose(config.run.dir, "analyze")
    stored = replace(stored, config=config)
    return run_session("analyze", folder, lambda: _analyze(stored, own, folder.path))


def split_arguments(arguments: Sequence[str]) -> tuple[AnalyzeConfig, list[str]]:
    """Part the fields of this command from those of the run.

    Raises:
        ConfigError: if a field of this command does not take its value.
    """
    return split_overrides(AnalyzeConfig, arguments)


def _analyze(stored: "Stored", own: AnalyzeConfig, folder: Path) -> Mapping[str, Any]:
    from gatewise.launch.analysis_report import draw_pictures, report_text, summary_lines
    from gatewise.launch.restore import restore_data
    from gatewise.parallel.config import ParallelConfig
    from gatewise.parallel.runtime import running
    from gatewise.training.measures.probe import cut_text

    data = restore_data(stored, folder)
    split = data.train if own.training_split else data.validation
    text = cut_text(
        split.tokens,
        sequence_length=stored.config.data.sequence_length,
        limit=own.tokens,
    )
    with running(ParallelConfig()) as runtime:
        found = _measure(stored, own, data, text, runtime.device)
    pictures = folder / "pictures"
    with writable(folder):
        pictures.mkdir(exist_ok=True)
        names = draw_pictures(found, pictures)
        report = folder / "report.md"
        report.write_text(report_text(found, names), encoding="utf-8")
    print("\n".join(summary_lines(found)))
    return {
        **found,
        "report": str(report),
        "pictures": [str(pictures / name) for name in names],
    }


def _measure(
    stored: "Stored",
    own: AnalyzeConfig,
    data: "PreparedData",
    text: "ProbeText",
    device: "torch.device",
) -> dict[str, Any]:
    from gatewise.launch.restore import restore_model
    from gatewise.training.measures.analysis import across_layers, layer_measures
    from gatewise.training.measures.gradients import router_gradients
    from gatewise.training.measures.probe import collect

    config = stored.config
    model = restore_model(stored, device=device)
    probe = collect(model, text, batch=config.evaluation.micro, device=device)
    vocab_size = data.tokenizer.vocab_size
    layers = layer_measures(probe, model, vocab_size=vocab_size, seed=own.seed)
    for layer in layers:
        ids = layer["context"]["top_ids"]
        layer["context"]["top_texts"] = [
            [data.tokenizer.decode_bytes([i]).decode("utf-8", "replace") for i in row]
            for row in ids
        ]
    micro = config.evaluation.micro
    split = router_gradients(
        model, text.input_WS[:micro].to(device), text.next_WS[:micro].to(device)
    )
    history = _history(stored, text, probe.expert_LTK(), device) if own.history else None
    return {
        "checkpoint": str(stored.path),
        "step": stored.step,
        "router": _router_name(config.router),
        "num_experts": config.model.num_experts,
        "top_k": config.model.top_k,
        "split": "training" if own.training_split else "validation",
        "tokens": int(probe.token_T.shape[0]),
        "layers": layers,
        "across_layers": across_layers(probe, num_experts=config.model.num_experts, seed=own.seed),
        "gradients": asdict(split),
        "over_checkpoints": history,
    }


def _router_name(router: RouterConfig) -> str:
    parts = (router.scorer.name, router.score.name, router.selector.name)
    return f"{router.kind} ({', '.join(parts)})"


def _history(
    stored: "Stored", text: "ProbeText", final_LTK: "torch.Tensor", device: "torch.device"
) -> dict[str, Any] | None:
    """Compare the routing with that of earlier checkpoints; None where there are none."""
    from gatewise.launch.restore import open_checkpoint, restore_model
    from gatewise.training.measures.analysis import over_checkpoints
    from gatewise.training.measures.probe import choices

    steps, found = [], []
    for path in sorted(stored.path.parent.glob("step_*")):
        if path == stored.path:
            break
        try:
            earlier = open_checkpoint(str(path))
        except CheckpointError as error:
            print(f"left out: {error}")
            continue
        model = restore_model(
            replace(earlier, config=replace(earlier.config, precision=stored.config.precision)),
            device=device,
        )
        steps.append(earlier.step)
        found.append(choices(model, text, batch=stored.config.evaluation.micro, device=device))
    if not steps:
        return None
    return over_checkpoints(
        [*steps, stored.step],
        [*found, final_LTK],
        text.input_WS.flatten(),
        num_experts=stored.config.model.num_experts,
        vocab_size=int(stored.meta["vocab_size"]),
    )
