"""Models whose experts are chosen before layer 0, and models that replay a recorded route."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import small_model
from torch import Tensor

from gatewise.conf.compose import load_train_config
from gatewise.moe import MoE
from gatewise.moe.attention import KeyValueCache
from gatewise.moe.config import ModelConfig, count_parameters
from gatewise.moe.model import Decoder, parameter_specs
from gatewise.moe.plan_ahead import StalePlanError
from gatewise.parallel.errors import ConfigError
from gatewise.routers.ahead.config import AheadConfig, AheadKind, AheadWeights
from gatewise.routers.ahead.plan import load_routes, record_routes, save_routes
from gatewise.routers.api import RoutingContext
from gatewise.routers.config import RouterConfig, ScoreFunction, Scorer, Selector
from gatewise.routers.presets import preset

VOCAB, EXPERTS = 40, 8
SIZES = ModelConfig(
    layers=4, hidden=16, heads=2, num_experts=EXPERTS, expert_width=8, dense_layers=1, init_std=0.2
)
GRU = AheadConfig(kind=AheadKind.gru, width=16, heads=2, state=8)
AHEAD = {
    "gru": GRU,
    "gru_weights": replace(GRU, weights=AheadWeights.pregate),
    "read_me": replace(GRU, kind=AheadKind.read_me),
    "read_me_single": replace(GRU, kind=AheadKind.read_me, per_layer=False),
    "hash": AheadConfig(kind=AheadKind.hash),
}
IN_LOOP = {
    "mixtral": preset("mixtral"),
    "switch": preset("switch"),
    "deepseek_v3": preset("deepseek_v3"),
    "recurrent": RouterConfig(scorer=Scorer.recurrent, state_dim=8),
    "cosine": RouterConfig(scorer=Scorer.cosine),
    "top_p": RouterConfig(selector=Selector.top_p, renormalise=False),
    "relu": RouterConfig(score=ScoreFunction.relu, selector=Selector.threshold, renormalise=False),
}


def build(router: RouterConfig, sizes: ModelConfig = SIZES) -> Decoder:
    return small_model(sizes, router, vocab_size=VOCAB, seed=3)


def tokens(batch: int = 2, positions: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCAB, (batch, positions), generator=generator)


def ahead_model(kind: str) -> Decoder:
    return build(RouterConfig(ahead=AHEAD[kind]))


@pytest.mark.parametrize("mode", ["training", "evaluation", "recomputation"])
@pytest.mark.parametrize("kind", AHEAD)
def test_what_is_executed_is_what_was_planned(kind: str, mode: str) -> None:
    model = ahead_model(kind).train(mode != "evaluation")
    model.recompute = mode == "recomputation"
    padding_T = torch.zeros(18, dtype=torch.bool)
    padding_T[-3:] = True
    output = model(tokens(), RoutingContext(padding_T=padding_T))
    assert model.ahead is not None
    planned = model.ahead.plan(tokens(), padding_T=padding_T)
    assert record_routes(output.routings, num_experts=EXPERTS).digest() == planned.digest()
    assert len(output.routings) == 3
    for routing in output.routings:
        assert (routing.weight_TK[-3:] == 0).all()
        torch.testing.assert_close(routing.weight_TK[:-3].sum(1), torch.ones(15))


@pytest.mark.parametrize("kind", AHEAD)
def test_a_token_by_token_pass_gives_what_one_pass_gives(kind: str) -> None:
    model = ahead_model(kind).eval()
    whole = model(tokens()).hidden_BSD
    cache = KeyValueCache()
    parts = [model(part_BS, cache=cache).hidden_BSD for part_BS in tokens().split((4, 1, 3, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_each_router_learns_from_its_own_teacher() -> None:
    """The text teaches the layers' routers, these teach the pre-gate; R1 has one router only."""
    model = ahead_model("gru").train()
    output = model(tokens())
    inner = [p for n, p in model.named_parameters() if ".router." in n]
    outer = [p for n, p in model.named_parameters() if n.startswith("ahead.")]
    assert len(inner) == 3
    text = torch.autograd.grad(
        output.hidden_BSD.square().sum(), inner + outer, retain_graph=True, allow_unused=True
    )
    assert all(g is not None and bool(g.any()) for g in text[:3])
    assert all(g is None for g in text[3:])
    distil = sum(routing.losses["distil"] for routing in output.routings)
    assert isinstance(distil, Tensor)
    lesson = torch.autograd.grad(distil, inner + outer, allow_unused=True)
    assert all(g is None for g in lesson[:3])
    assert all(g is not None and bool(g.any()) for g in lesson[3:])
    weighing = ahead_model("gru_weights").train()
    assert not [n for n, _ in weighing.named_parameters() if ".router." in n]
    output = weighing(tokens())
    assert "distil" not in output.routings[0].losses
    output.hidden_BSD.square().sum().backward()
    heads = weighing.get_parameter("ahead.w_head_LEH").grad
    assert heads is not None
    assert bool(heads.any())


def test_the_pre_gate_learns_to_choose_as_the_layers_do() -> None:
    model = ahead_model("gru").train()
    learning = [p for n, p in model.named_parameters() if n.startswith("ahead.")]
    optimizer = torch.optim.SGD(learning, lr=2.0, momentum=0.9)
    recalls = []
    for _ in range(80):
        output = model(tokens())
        recalls.append(float(sum(r.health["recall"] for r in output.routings)) / 3 / 18)
        optimizer.zero_grad()
        sum(r.losses["distil"] for r in output.routings).backward()  # type: ignore[union-attr]
        optimizer.step()
        assert model.ahead is not None
        model.ahead.advance()
    assert recalls[0] < 0.5
    assert recalls[-1] > 0.85


@pytest.mark.parametrize("kind", AHEAD)
def test_parameters_are_counted_and_belong_to_the_router(kind: str) -> None:
    model, router = ahead_model(kind), RouterConfig(ahead=AHEAD[kind])
    counted = count_parameters(SIZES, VOCAB, router)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    specs = [spec for spec in parameter_specs(model) if spec.label == "router"]
    assert counted.router == sum(spec.parameter.numel() for spec in specs)
    assert {s.name for s in specs} >= {
        name for name, _ in model.named_parameters() if name.startswith("ahead.")
    }


def test_a_stale_plan_is_refused() -> None:
    model = ahead_model("gru")
    (plan,) = model.plan([tokens()])
    assert plan is not None
    model(tokens(), plan=plan)
    assert model.ahead is not None
    model.ahead.advance()
    with pytest.raises(StalePlanError, match="plan again after every update"):
        model(tokens(), plan=plan)


@pytest.mark.parametrize("name", IN_LOOP)
def test_a_recorded_route_replays_any_router(name: str, tmp_path: Path) -> None:
    model = build(IN_LOOP[name]).eval()
    output = model(tokens())
    save_routes(tmp_path / "route.npz", record_routes(output.routings, num_experts=EXPERTS))
    (plan,) = model.plan_routes([load_routes(tmp_path / "route.npz")])
    again = model(tokens(), plan=plan)
    assert torch.equal(again.hidden_BSD, output.hidden_BSD)
    with torch.no_grad():  # other scores: the same experts, weighed anew
        for parameter in (p for n, p in model.named_parameters() if "router" in n):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    changed, free = model(tokens(), plan=plan), model(tokens())
    for recorded, now, own in zip(output.routings, changed.routings, free.routings, strict=True):
        columns = recorded.expert_TK.shape[1]
        assert torch.equal(now.expert_TK[:, :columns], recorded.expert_TK)
        assert not torch.equal(now.weight_TK[:, :columns], recorded.weight_TK)
        assert own.expert_TK.shape != recorded.expert_TK.shape or not torch.equal(
            own.expert_TK, recorded.expert_TK
        )
        assert (now.weight_TK[now.expert_TK < 0] == 0).all()


def test_a_route_that_does_not_fit_is_refused_in_one_line() -> None:
    model = build(preset("mixtral"))
    route = record_routes(model(tokens()).routings, num_experts=EXPERTS)
    (plan,) = model.plan_routes([route])
    with pytest.raises(ValueError, match="made for 18 tokens but this batch has 20"):
        model(tokens(2, 10), plan=plan)
    deeper = build(preset("mixtral"), replace(SIZES, layers=5))
    with pytest.raises(ValueError, match="made for 3 MoE layers but this batch has 4"):
        deeper(tokens(), plan=plan)


def test_a_layer_alone_refuses_a_pre_gate() -> None:
    with pytest.raises(ValueError, match="'gru_pregate', which decides for the layers of a model"):
        MoE(8, 8, 4, router="gru_pregate")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["router.selector=top_p"], "router.selector is top_p, but with router.ahead.kind=gru"),
        (["router.bias_rate=0.001"], "set router.bias_rate=0.0 or router.ahead.kind=off"),
        (["model.capacity.factor=1.5"], "set the factor to null or router.ahead.exchange=layer"),
        (["model.num_experts=0"], "router.ahead.kind is gru but the model has no MoE layer"),
        (["router.ahead.heads=3"], "router.ahead.heads is 3"),
        (
            ["router.scorer=recurrent", "router.ahead.weights=pregate"],
            "router.scorer is recurrent, but with router.ahead.weights=pregate",
        ),
    ],
)
def test_settings_that_choose_in_the_layers_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_train_config(["experiment=tiny", "router=gru_pregate", *arguments])
    assert "\n" not in str(caught.value)
