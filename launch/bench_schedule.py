"""`gatewise bench schedule`: schedules of a layer of experts on emulated nodes, and predictions.

Nodes are network namespaces with shaped links (`testbed.py`); ranks in them measure their costs,
plan with every policy, and run the plans in turns (`schedule_trials.py`). What comes out are
speed-ups of schedules over gloo and TCP on one machine, never the throughput of a GPU.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from gatewise.conf.compose import load_settings
from gatewise.conf.fields import field_table
from gatewise.launch.lists import split_list
from gatewise.launch.machine import available_cores, cpu_model
from gatewise.launch.run_folder import RunFolder, writable
from gatewise.launch.session import run_session
from gatewise.launch.spawn import run_ranks
from gatewise.launch.testbed import UNSHAPED, Links, Testbed, missing_for_namespaces
from gatewise.launch.usage import usage_text
from gatewise.moe.planning.whole import POLICIES
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.profiles import Layout, Profile, read_profile, write_profile
from gatewise.training.config import RunConfig

__all__ = ["ScheduleBenchConfig", "TestbedKind", "choose_testbed", "parse_links", "run", "usage"]

_SUMMARY = """Run the schedules of a layer of experts (forward, backward or both) on two or more
emulated nodes with shaped links, in turns, and compare them with what was predicted. Namespaces
need root; on the loopback there are no links to shape."""
_LAYER_POLICIES = tuple(name for name in POLICIES if name not in ("whole_block", "paired"))
_STEP_POLICIES = (*_LAYER_POLICIES, "whole_block")
_COMPUTES = ("emulated", "real")
_PASSES = {"forward": ("forward",), "backward": ("backward",), "both": ("forward", "backward")}
_LOOPBACK_LACKS = (
    "on the loopback all ranks share one unshaped link: neither the overlap of links within nodes "
    "and between them nor speed-ups on slow links can be shown"
)


class TestbedKind(Enum):
    """Where ranks run."""

    __test__ = False  # not a test, whatever pytest thinks of the name

    auto = "auto"  # namespaces where they can be made, else loopback
    namespaces = "namespaces"
    loopback = "loopback"


@dataclass(kw_only=True, slots=True)
class ScheduleBenchConfig:
    """Settings of the schedule benchmark; lists are written with commas."""

    testbed: TestbedKind = TestbedKind.auto  # auto: namespaces with root, else loopback
    nodes: int = 2  # emulated nodes
    ranks_per_node: int = 2  # ranks that split each expert
    links: str = "400/1600"  # Mbit/s between nodes / within one, or unshaped
    tokens: str = "4096"  # rows that each rank sends
    width: int = 256  # numbers of a row, fp32
    expert_width: int = 1024  # inner width of an expert
    compute: str = "emulated"  # emulated: the expert sleeps; real: it computes
    device_gmacs: float = 25.0  # 1e9 multiply-adds a second of the emulated device
    passes: str = "both"  # forward, backward, both
    blocks: int = 0  # whole blocks of a step, emulated; 0: the layer of experts alone
    sequences: int = 4  # of a micro-batch, where there are blocks
    policies: str | None = None  # null: all that apply
    gradient_bytes: int = 0  # of a gradient that is summed in the backward pass
    without_sum: str = ""  # policies that are measured again without that sum
    trials: int = 20  # each runs every policy once
    max_chunks: int = 8  # most chunks of a pass
    profile: str | None = None  # file of measured costs; null: measured now
    timeout: float = 60.0  # seconds after which a collective that hangs ends the run
    seed: int = 0  # of rows and weights
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("width", "expert_width", "trials", "max_chunks", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.nodes < 2:
            raise ValueError(f"nodes is {self.nodes}; it must be at least 2")
        for name in ("device_gmacs", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.gradient_bytes < 0 or self.gradient_bytes % 4:
            raise ValueError(
                f"gradient_bytes is {self.gradient_bytes}; it must be a multiple of 4 (fp32), or 0"
            )
        if self.expert_width % self.ranks_per_node:
            raise ValueError(
                f"expert_width is {self.expert_width}, which ranks_per_node "
                f"({self.ranks_per_node}) does not divide"
            )
        if self.passes not in _PASSES:
            raise ValueError(f"passes is {self.passes!r}; it must be one of {', '.join(_PASSES)}")
        self._check_tokens()
        parse_links(self.links)
        if not _choices("compute", self.compute, _COMPUTES):
            raise ValueError("compute is empty; give emulated, real or both")
        self._check_blocks()
        _choices("policies", self.policies or "", self.known_policies)
        without = _choices("without_sum", self.without_sum, _LAYER_POLICIES)
        if without and not (self.gradient_bytes and self.passes != "forward"):
            raise ValueError(
                "without_sum names policies, but there is no gradient sum to leave out; set "
                "gradient_bytes, and passes to backward or both"
            )

    def _check_blocks(self) -> None:
        if self.blocks < 0 or self.sequences < 1:
            raise ValueError(
                f"blocks is {self.blocks} and sequences {self.sequences}; they must be at least 0 "
                "and 1"
            )
        if self.blocks and (self.compute, self.passes, self.gradient_bytes) != (
            "emulated",
            "both",
            0,
        ):
            raise ValueError(
                f"blocks is {self.blocks}; whole blocks have compute=emulated, passes=both and "
                "gradients of their own (gradient_bytes=0)"
            )

    @property
    def known_policies(self) -> tuple[str, ...]:
        """Policies that apply."""
        return _STEP_POLICIES if self.blocks else _LAYER_POLICIES

    def _check_tokens(self) -> None:
        for tokens in self.token_list():
            if tokens < 1 or tokens % self.nodes:
                raise ValueError(
                    f"tokens has {tokens}; it must be a multiple of nodes ({self.nodes})"
                )
            if tokens // self.nodes < self.max_chunks:
                raise ValueError(
                    f"max_chunks is {self.max_chunks}, but only {tokens // self.nodes} of "
                    f"{tokens} rows go to each of {self.nodes} nodes; use at most as many chunks"
                )

    def token_list(self) -> tuple[int, ...]:
        """Return the sizes.

        Raises:
            ValueError: naming what is no number.
        """
        allowed = "whole numbers, as 2048,4096"
        found = split_list(self.tokens, "tokens", int, allowed=allowed)
        if not found:
            raise ValueError("tokens is empty; give at least one number of rows")
        return tuple(found)


def _choices(name: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the parts of a list, each of them one of `allowed`."""
    known = {choice: choice for choice in allowed}
    words = ", ".join(allowed)
    return tuple(split_list(text, name, known.__getitem__, allowed=words, names=allowed))


def parse_links(text: str) -> tuple[Links, ...]:
    """Return the links that a list stands for.

    Args:
        text: such as "400/1600,400/unshaped,unshaped".

    Raises:
        ValueError: naming the part.
    """
    allowed = "Mbit/s between nodes / within one, as 400/1600, or unshaped"
    found = split_list(text, "links", _links, allowed=allowed)
    if not found:
        raise ValueError("links is empty; give Mbit/s between nodes / within one, or unshaped")
    return tuple(found)


def _links(text: str) -> Links:
    if text == "unshaped":
        return UNSHAPED
    inter, slash, intra = text.partition("/")
    if not slash:
        raise ValueError(text)
    return Links(_mbit(inter), _mbit(intra))


def _mbit(text: str) -> float | None:
    if text == "unshaped":
        return None
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def choose_testbed(config: ScheduleBenchConfig) -> tuple[TestbedKind, str]:
    """Return where ranks run, and what that cannot show.

    Raises:
        ConfigError: if namespaces are asked for and cannot be made.
    """
    kind = config.testbed
    missing = missing_for_namespaces()
    if kind is TestbedKind.namespaces and missing:
        raise ConfigError(
            f"testbed is namespaces, but making them needs {missing}; run as root where `ip` and "
            "`tc` are installed, or use testbed=loopback"
        )
    if kind is TestbedKind.loopback:
        return kind, _LOOPBACK_LACKS
    why = f"without {missing}"
    if not missing:
        try:
            with Testbed(2, UNSHAPED):  # root in a container may not have the right to
                return TestbedKind.namespaces, ""
        except ConfigError as error:
            if kind is TestbedKind.namespaces:
                raise
            why = f"here ({error})"
    ignored = f"links={config.links} is left out" if config.links != "unshaped" else "unshaped"
    return TestbedKind.loopback, f"no namespaces {why}; {ignored}; {_LOOPBACK_LACKS}"


def usage(arguments: Sequence[str]) -> str:
    """Return the help of the command."""
    table = field_table(load_settings(ScheduleBenchConfig, arguments))
    return usage_text("bench schedule", _SUMMARY, table)


def run(arguments: Sequence[str]) -> int:
    """Measure, print a table, store `rows` in `result.json` and return the exit code."""
    config = load_settings(ScheduleBenchConfig, arguments)
    kind, lacks = choose_testbed(config)
    known = _known_profile(config)
    folder = RunFolder.choose(config.run.dir, "bench-schedule")
    folder.write_environment(["bench", "schedule", *arguments])
    ranks = config.nodes * config.ranks_per_node
    return run_session(
        "bench schedule",
        folder,
        lambda: _bench(config, kind, lacks, known, folder),
        world_size=ranks,
    )


def _known_profile(config: ScheduleBenchConfig) -> Profile | None:
    """Return the profile that the settings name, checked against this layout."""
    if config.profile is None:
        return None
    several = [config.links, config.compute]
    if any("," in text for text in several):
        raise ConfigError(
            "profile names one file, but links or compute have several values; costs differ "
            "between them: run each alone, or leave profile out"
        )
    profile = read_profile(Path(config.profile).expanduser())
    ranks = config.nodes * config.ranks_per_node
    layout = Layout(ranks, config.ranks_per_node, config.nodes, config.ranks_per_node)
    profile.require(layout, name=f"profile {config.profile}")
    return profile


def _bench(
    config: ScheduleBenchConfig,
    kind: TestbedKind,
    lacks: str,
    known: Profile | None,
    folder: RunFolder,
) -> dict[str, Any]:
    from gatewise.launch.chain_profile import ChainSize  # imports torch
    from gatewise.launch.schedule_report import make_report
    from gatewise.launch.schedule_trials import Settings, bench_rank

    print("gatewise bench schedule:", folder.path)
    if lacks:
        print(f"  {lacks}")
    computes = _choices("compute", config.compute, _COMPUTES)
    known_policies = config.known_policies
    wanted = config.policies or ",".join(known_policies)
    policies = _choices("policies", "serial," + wanted, known_policies)
    settings = Settings(
        size=ChainSize(
            config.nodes,
            config.ranks_per_node,
            config.width,
            config.expert_width,
            config.device_gmacs,
            config.seed,
        ),
        nodes=(),
        links="unshaped",
        tokens=config.token_list(),
        computes=computes,
        passes=_PASSES[config.passes],
        policies=policies,
        without_sum=_choices("without_sum", config.without_sum, _LAYER_POLICIES),
        gradient_bytes=config.gradient_bytes if config.passes != "forward" else 0,
        trials=config.trials,
        max_chunks=config.max_chunks,
        timeout=config.timeout,
        blocks=config.blocks,
        sequences=config.sequences,
        profiles={} if known is None else {computes[0]: known},
    )
    links = parse_links(config.links) if kind is TestbedKind.namespaces else (UNSHAPED,)
    measured = []
    for link in links:
        testbed = Testbed(config.nodes, link) if kind is TestbedKind.namespaces else None
        print(f"links {link}", flush=True)
        with testbed or nullcontext():
            outcomes = run_ranks(
                bench_rank,
                config.nodes * config.ranks_per_node,
                (replace(settings, nodes=testbed.names if testbed else (), links=str(link)),),
                threads=1,
                logs=folder.logs,
            )
        trials = [(outcome.result or {})["trials"] for outcome in outcomes]
        measured.append((link, trials))
        for compute, profile in trials[0].profiles.items():
            name = f"profile_{str(link).replace('/', '_')}_{compute}.json"
            with writable(folder.path):
                write_profile(profile, folder.path / name)
    report = make_report(folder, measured, ranks_per_node=config.ranks_per_node)
    return {
        "testbed": kind.value,
        "cannot_show": lacks,
        **report,
        "settings": {
            "nodes": config.nodes,
            "ranks_per_node": config.ranks_per_node,
            "width": config.width,
            "expert_width": config.expert_width,
            "device_gmacs": config.device_gmacs,
            "passes": config.passes,
            "trials": config.trials,
            "max_chunks": config.max_chunks,
            "blocks": config.blocks,
            "sequences": config.sequences,
        },
        "cpu": cpu_model(),
        "cores": available_cores(),
    }
