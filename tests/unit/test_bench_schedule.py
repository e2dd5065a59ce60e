"""`gatewise bench schedule` without ranks: its settings, its statistics and its plans."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gatewise.conf.compose import load_settings
from gatewise.launch import bench_schedule, testbed
from gatewise.launch.bench_chain import PreparedPass
from gatewise.launch.bench_schedule import (
    ScheduleBenchConfig,
    TestbedKind,
    choose_testbed,
    parse_links,
)
from gatewise.launch.chain_profile import ChainSize, make_problem
from gatewise.launch.cli import main
from gatewise.launch.testbed import UNSHAPED, Links
from gatewise.launch.trials import median_interval, paired_speedup, trial_orders
from gatewise.moe.planning.policies import Problem
from gatewise.moe.planning.whole import propose
from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Cost, Interference
from gatewise.parallel.schedule.profiles import OPERATIONS, Layout, Profile, write_profile

SIZE = ChainSize(2, 2, 256, 1024, 25.0)


def profile(size: ChainSize = SIZE) -> Profile:
    """Return what two nodes of two ranks roughly cost at 400 and 1600 Mbit/s."""
    costs = dict.fromkeys(OPERATIONS, Cost(0.5, 1e-8))
    costs |= {
        "all_to_all": Cost(0.5, 2e-5),
        "all_gather": Cost(0.5, 5e-6),
        "reduce_scatter": Cost(0.5, 5e-6),
        "all_reduce": Cost(0.5, 4e-5),
        "experts": Cost(0.1, 4e-8),
    }
    return Profile(size.layout, costs, Interference.none(), "made up")


def problem(**changes: Any) -> Problem:
    settings: dict[str, Any] = {
        "tokens": 4096,
        "gradient_bytes": 0,
        "max_chunks": 8,
        "passes": ("forward", "backward"),
    }
    return make_problem(SIZE, profile(), **settings | changes)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nodes=1", "nodes is 1; it must be at least 2"),
        ("trials=0", "trials is 0; it must be at least 1"),
        ("links=400", "links has '400'; it takes Mbit/s between nodes / within one"),
        ("links=400/", "links has '400/'; it takes"),
        ("links=-1/5", "links has '-1/5'; it takes"),
        ("links=,", "links is empty"),
        ("tokens=x", "tokens has 'x'; it takes whole numbers"),
        ("tokens=,", "tokens is empty; give at least one number of rows"),
        ("compute=,", "compute is empty; give emulated, real or both"),
        ("tokens=4097", "tokens has 4097; it must be a multiple of nodes (2)"),
        ("tokens=8", "max_chunks is 8, but only 4 of 8 rows go to each of 2 nodes"),
        ("compute=fast", "compute has 'fast'; it takes emulated, real"),
        ("policies=fsmo", "policies has 'fsmo'; did you mean 'fsmoe'?; it takes serial"),
        ("policies=whole_block", "policies has 'whole_block'"),
        ("blocks=2 compute=real", "blocks is 2; whole blocks have compute=emulated"),
        ("blocks=-1", "blocks is -1 and sequences 4; they must be at least 0 and 1"),
        ("passes=all", "passes is 'all'; it must be one of forward, backward, both"),
        ("gradient_bytes=3", "gradient_bytes is 3; it must be a multiple of 4"),
        ("without_sum=fsmoe", "there is no gradient sum to leave out"),
        ("expert_width=3", "expert_width is 3, which ranks_per_node (2) does not divide"),
        ("device_gmacs=0", "device_gmacs is 0.0; it must be above 0"),
    ],
)
def test_a_mistake_is_one_line_with_the_field(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(ScheduleBenchConfig, argument.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_are_read_with_and_without_a_limit() -> None:
    assert parse_links("400/1600, unshaped,200/unshaped") == (
        Links(400.0, 1600.0),
        UNSHAPED,
        Links(200.0, None),
    )
    assert [str(links) for links in parse_links("400/1600,unshaped,200/unshaped")] == [
        "400/1600",
        "unshaped",
        "200/unshaped",
    ]


def test_namespaces_without_root_are_a_mistake_and_auto_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_schedule, "missing_for_namespaces", lambda: "root")
    arguments = ["bench", "schedule", "testbed=namespaces", f"run.dir={tmp_path}"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "testbed is namespaces, but making them needs root" in said
    assert said.count("\n") == 1
    kind, lacks = choose_testbed(ScheduleBenchConfig())
    assert kind is TestbedKind.loopback
    assert lacks.startswith("no namespaces without root; links=400/1600 is left out; on the ")


def test_auto_takes_the_loopback_where_root_may_not_make_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*command: str) -> None:
        raise ConfigError(f"`{' '.join(command[:3])}` failed")

    monkeypatch.setattr(bench_schedule, "missing_for_namespaces", lambda: "")
    monkeypatch.setattr(testbed, "_run", refused)
    kind, lacks = choose_testbed(ScheduleBenchConfig())
    assert kind is TestbedKind.loopback
    assert lacks.startswith("no namespaces here (`ip netns add` failed); links=400/1600 is left")
    with pytest.raises(ConfigError, match="`ip netns add` failed"):
        choose_testbed(ScheduleBenchConfig(testbed=TestbedKind.namespaces))


def test_lists_take_each_part_once() -> None:
    config = ScheduleBenchConfig(tokens="2048,4096,2048")
    assert config.token_list() == (2048, 4096)
    assert len(parse_links("400/1600,unshaped,400/1600")) == 2


def test_one_node_that_stays_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []

    def run(*command: str) -> None:
        if command[-1] == "gw1x0":
            raise ConfigError("device or resource busy")
        removed.append(command[-1])

    monkeypatch.setattr(testbed, "_run", run)
    with pytest.raises(ConfigError, match="busy"):
        testbed._remove(["gw1x0", "gw1x1", "gw1xs"])
    assert removed == ["gw1x1", "gw1xs"]


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "tc" else tool)
    assert "tc" in testbed.missing_for_namespaces()


def test_a_profile_of_another_layout_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ChainSize(4, 2, 256, 1024, 25.0)
    file = tmp_path / "profile.json"
    write_profile(profile(other), file)
    arguments = ["bench", "schedule", "testbed=loopback", f"profile={file}"]
    assert main(arguments) == 2
    assert "is of another layout: its ranks is 8, this job's is 4" in capsys.readouterr().err


def test_a_profile_that_lacks_a_bandwidth_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    write_profile(profile(), file)
    value = json.loads(file.read_text())
    del value["costs"]["all_gather"]["beta_ms"]
    file.write_text(json.dumps(value))
    assert main(["bench", "schedule", "testbed=loopback", f"profile={file}"]) == 2
    said = capsys.readouterr().err
    assert "cost of all_gather" in said
    assert "beta_ms" in said
    assert said.count("\n") == 1


def test_a_profile_serves_one_kind_of_links_and_compute(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "schedule", "profile=x.json", "compute=emulated,real"]) == 2
    assert "profile names one file, but links or compute have several" in capsys.readouterr().err


def test_every_other_trial_runs_backwards() -> None:
    assert trial_orders(3, 3) == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = random.Random(1)
    hits = 0
    for seed in range(60):
        values = [generator.gauss(10, 2) for _ in range(25)]
        _, low, high = median_interval(values, seed=seed)
        hits += low <= 10 <= high
    assert 50 <= hits <= 60


def test_a_speedup_is_of_pairs_from_one_trial() -> None:
    noise = [1.0, 5.0, 2.0, 9.0, 3.0]  # both get slower together
    middle, low, high = paired_speedup([2 * n for n in noise], noise)
    assert middle == low == high == 2.0


def test_serial_is_predicted_as_the_sum_of_all_work() -> None:
    proposal = propose("serial", problem())
    costs = profile().costs
    rows = 4096 * 256 * 4
    macs = 4096 * 2 * 256 * 512
    moves = 2 * costs["all_to_all"].ms(rows) + 2 * costs["all_gather"].ms(2 * rows)
    expected = 2 * moves + 3 * 2 * costs["experts"].ms(macs)
    assert proposal.predicted_ms == pytest.approx(expected)


def test_one_pass_alone_leaves_the_other_without_work() -> None:
    both = propose("fsmoe", problem())
    forward = propose("fsmoe", problem(passes=("forward",)))
    backward = propose("fsmoe", problem(passes=("backward",)))
    assert forward.predicted_ms + backward.predicted_ms == pytest.approx(both.predicted_ms)
    assert not forward.passes["backward"].graph.stages


def test_rows_and_gradients_are_cut_without_gaps() -> None:
    gradient = 1000
    for policy in ("serial", "fsmoe", "interleaved"):
        proposal = propose(policy, problem(gradient_bytes=gradient * 4))
        for item in proposal.passes.values():
            prepared = PreparedPass.of(item, 2048, gradient)
            assert [cut.start for cut in prepared.cuts[1:]] == [c.stop for c in prepared.cuts[:-1]]
            assert prepared.cuts[0].start == 0
            assert prepared.cuts[-1].stop == 2048
        pieces = sorted((piece.start, piece.stop) for piece in prepared.slices.values())
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == gradient
    assert not PreparedPass.of(propose("fsmoe", problem()).passes["backward"], 64, 0).slices


def test_layouts_say_who_shares_a_node() -> None:
    assert SIZE.layout == Layout(4, 2, 2, 2)
    assert SIZE.layout.expert_spans_nodes
