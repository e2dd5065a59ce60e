"""What README.md and docs/ show exists: commands, settings, links, files, metrics and code."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training_runs import make_text, run, tiny

from gatewise.compression.config import CompressConfig
from gatewise.conf.compose import load_beside, load_settings, load_train_config, override_config
from gatewise.conf.fields import field_table
from gatewise.launch import (
    analyze,
    bench_pregate,
    bench_step,
    drill,
    estimate,
    evaluate,
    submit,
    verify,
)
from gatewise.launch.bench_generate import GenerateBenchConfig
from gatewise.launch.bench_kernels import KernelBenchConfig
from gatewise.launch.bench_layer import LayerBenchConfig
from gatewise.launch.bench_schedule import ScheduleBenchConfig
from gatewise.launch.cli import COMMANDS
from gatewise.launch.convert_gguf import ConvertGgufConfig
from gatewise.launch.convert_in import ConvertInConfig
from gatewise.launch.convert_megatron_in import split_source
from gatewise.launch.convert_megatron_out import MegatronOutConfig
from gatewise.launch.convert_out import ConvertOutConfig
from gatewise.launch.dashboard import DashboardConfig, without_push
from gatewise.launch.doctor import DoctorConfig, without_build
from gatewise.launch.export import ExportConfig
from gatewise.launch.generate import GenerateConfig
from gatewise.launch.jobs import Request, layout
from gatewise.launch.plan import PlanConfig
from gatewise.launch.points import Combination, expand
from gatewise.launch.report import ReportConfig, split_runs
from gatewise.launch.search import Search
from gatewise.launch.simulate import SimulateConfig
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import EvaluationConfig, RunConfig, TrainConfig
from gatewise.training.distil_config import DistilConfig
from gatewise.training.schedule_config import ScheduleConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {name.partition(".")[0] for name in field_table(TrainConfig()) if "." in name}
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
MODULE = "-m gatewise.launch."
OF_A_RUN: dict[str, Callable[[list[str]], object]] = {  # take the fields of a run
    "convert from_megatron": lambda words: load_train_config(split_source(words)[1]),
    "train": load_train_config,
    "drill": lambda words: load_beside(drill.DrillConfig, words),
    "estimate": lambda words: load_beside(estimate.EstimateConfig, words),
    "verify": lambda words: load_beside(verify.VerifyConfig, words),
}


def pages() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str = "") -> Iterator[list[str]]:
    """Yield the lines of each fenced block of a language, and with "" of all code."""
    lines: list[str] = []
    fence: str | None = None
    for line in [*page.read_text(encoding="utf-8").splitlines(), ""]:
        is_mark = line.startswith("```")
        inside = fence is not None or (not language and line.startswith("    "))
        if inside and not is_mark:
            lines.append(line)
            continue
        if lines and (not language or fence == language):
            yield lines
        lines = []
        if is_mark:
            fence = line.removeprefix("```") if fence is None else None
    assert fence is None, f"{page.name}: a block is not closed"


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def shown_commands(page: Path) -> list[tuple[str, str]]:
    """Return each command of a page with the line after it."""
    found = []
    for lines in blocks(page):
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            found.append((line.strip().removeprefix("$ "), after.strip()))
    found += [(span, "") for span in SPAN.findall(prose(page))]
    return [
        (command, after)
        for command, after in found
        if (command.startswith("gatewise ") and "..." not in command) or MODULE in command
        if not re.match(r"gatewise [a-z ]+: ", command)  # what a command printed
    ]


def points_of(request: Request) -> list[Combination]:
    if not request.multirun:
        return [({}, list(request.overrides))]
    if request.submit.trials is None:
        return expand(request.overrides)
    return Search(request.overrides, draw=request.submit.draw).ends()


def parse(command: str) -> None:
    """Parse a command as its module would, without running it."""
    words = shlex.split(command.partition(MODULE)[2] if MODULE in command else command)
    if MODULE not in command or words[0] == "cli":
        assert words.pop(0) in ("gatewise", "cli")
    if not words or words[0].startswith("-"):
        assert words in ([], ["--help"], ["--version"])
        return
    name, rest = words[0], words[1:]
    if name == "COMMAND":  # of `gatewise COMMAND --help`
        return
    if name in ("bench", "convert"):
        name, rest = " ".join(words[:2]), words[2:]
    assert name.partition(" ")[0] in COMMANDS, command
    rest = [word for word in rest if word != "--help"]
    if name in OF_A_RUN:
        OF_A_RUN[name](rest)
    elif name == "submit":
        request = submit.parse(rest)
        for _, overrides in points_of(request):
            layout(request.submit, overrides)
    elif name == "evaluate":
        evaluation, others = evaluate.split_arguments(rest)
        assert evaluation.checkpoint is not None, command
        override_config(TrainConfig(run=RunConfig()), others, sections=evaluate._SECTIONS)
    elif name == "analyze":
        settings, others = analyze.split_arguments(rest)
        assert settings.checkpoint is not None, command
        override_config(TrainConfig(run=RunConfig()), others, sections=(*analyze._SECTIONS, "run"))
    elif name == "bench pregate":
        load_train_config(bench_pregate._with_defaults(bench_pregate._split(rest)[1]))
    elif name == "bench step":
        load_train_config(bench_step._with_experiment(bench_step._split(rest)[1]))
    else:
        schemas = {
            "generate": GenerateConfig,
            "compress": CompressConfig,
            "convert from_gguf": ConvertGgufConfig,
            "convert from_hf": ConvertInConfig,
            "convert to_hf": ConvertOutConfig,
            "bench generate": GenerateBenchConfig,
            "convert to_megatron": MegatronOutConfig,
            "bench kernels": KernelBenchConfig,
            "export": ExportConfig,
            "bench layer": LayerBenchConfig,
            "bench schedule": ScheduleBenchConfig,
            "dashboard": DashboardConfig,
            "distil": DistilConfig,
            "doctor": DoctorConfig,
            "plan": PlanConfig,
            "report": ReportConfig,
            "simulate": SimulateConfig,
        }
        settings_of = {
            "dashboard": without_push,
            "doctor": without_build,
            "report": lambda words: split_runs(words)[1],
        }
        load_settings(schemas[name], settings_of.get(name, list)(rest))


@pages()
def test_every_command_has_known_names_and_possible_values(page: Path) -> None:
    for command, after in shown_commands(page):
        if not after.startswith("gatewise: error: "):
            parse(command)
            continue
        with pytest.raises(ConfigError) as mistake:  # shown for its message
            parse(command)
        assert str(mistake.value) == after.removeprefix("gatewise: error: ")


def test_there_are_commands_to_check() -> None:
    commands = [command for page in PAGES for command, _ in shown_commands(page)]
    assert {command.split()[1] for command in commands} >= COMMANDS.keys()
    assert any("torchrun" in command for command in commands)


@pytest.mark.parametrize(
    "command",
    ["gatewise tran", "gatewise train model.layer=3", "gatewise evaluate checkpoint=x steps=3"],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        parse(command)


@pytest.mark.parametrize(
    ("message", "overrides"),
    [
        ("batch.sequences is 8, which parallel.ranks (3) does not divide", ["parallel.ranks=3"]),
        (
            "model.num_experts is 4, which parallel.expert (8) does not divide",
            ["parallel.ranks=8", "parallel.expert=8"],
        ),
    ],
)
def test_the_messages_of_the_readme_are_the_real_ones(message: str, overrides: list[str]) -> None:
    assert f"`{message}`" in prose(ROOT / "README.md")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_train_config(["experiment=tiny", *overrides])


@pages()
def test_every_setting_that_is_named_exists(page: Path) -> None:
    table = field_table(TrainConfig())
    for span in SPAN.findall(prose(page)):
        for word in span.split():
            match = re.match(r"([a-z]+)\.([a-z_]+)(=|$)", word)
            if match and match[1] in SECTIONS and match[0].rstrip("=") != "data.py":
                assert match[0].rstrip("=") in table, f"{page.name}: {span}"


@pages()
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings}
            assert anchor in anchors, f"{page.name}: {target}"


@pages()
def test_every_file_that_is_named_exists(page: Path) -> None:
    folders = ("benchmarks", "compression", "conf", "docs", "launch", "moe", "parallel")
    folders += ("routers", "training")
    sources = {path.name for name in (*folders, "tests") for path in (ROOT / name).rglob("*.*")}
    for span in SPAN.findall(prose(page)):
        if re.fullmatch(r"[\w/]+/[\w.]+\.(py|md|h|yaml)", span) and "<" not in span:
            assert (ROOT / span).exists() or Path(span).name in sources, f"{page.name}: {span}"
        elif re.fullmatch(r"\w+\.py", span):
            assert span in sources or span == "example.py", f"{page.name}: {span}"


@pages()
def test_every_python_block_compiles(page: Path) -> None:
    for number, lines in enumerate(blocks(page, "python")):
        compile("\n".join(lines), f"{page.name} block {number}", "exec")


@pytest.mark.parametrize("page", ["README.md", "docs/moe.md"])
def test_the_layer_alone_runs_as_shown(page: str) -> None:
    scope: dict[str, object] = {}
    example = next(blocks(ROOT / page, "python"))
    assert len(example) <= 10
    exec("\n".join(example), scope)
    assert scope["y"].shape == scope["x"].shape  # type: ignore[attr-defined]


def test_the_page_on_training_explains_every_metric_and_no_other(tmp_path: Path) -> None:
    table = prose(ROOT / "docs" / "training.md").partition("\n## What the metrics mean")[2]
    cells = re.findall(r"^\| (`.+?) \|", table, re.M)
    explained = {key for cell in cells for key in SPAN.findall(cell)}
    assert len(explained) > 30
    config = tiny(
        2,
        evaluation=EvaluationConfig(every=1, tokens=400, micro=4),
        schedule=ScheduleConfig(profile="measure"),  # for the metrics of plans
    )
    records = run(config, make_text(tmp_path), tmp_path / "run").records
    recorded = {key for record in records for key in record}
    layers = {key for key in recorded if re.match(r"moe/layer_\d\d/", key)}
    values = {key.removeprefix("moe/") for key in recorded - layers if key.startswith("moe/")}
    assert {key.rpartition("/")[2] for key in layers} == values
    assert recorded - layers == explained - {"moe/layer_NN/*"}
