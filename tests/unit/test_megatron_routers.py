"""Our routers in Megatron-core's place: the interface here, its own layer where it is installed."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewise.moe.backends.megatron import MegatronRouters
from gatewise.moe.config import Activation
from gatewise.moe.dispatch import LocalDispatcher
from gatewise.moe.experts import GroupedExperts
from gatewise.moe.layer import MoELayer
from gatewise.routers.ahead.agreement import learn_to_agree
from gatewise.routers.ahead.config import AheadConfig, AheadKind, AheadWeights
from gatewise.routers.ahead.plan import RoutePlan
from gatewise.routers.ahead.pregate import build_pregate
from gatewise.routers.api import RoutingContext
from gatewise.routers.balance import update_bias_
from gatewise.routers.config import BalanceScope, RouterConfig, Scorer, Selector
from gatewise.routers.router import build_cell, build_router

BATCH, POSITIONS, HIDDEN, EXPERTS, TOP_K, WIDTH, LAYERS, IDS = 2, 5, 16, 4, 2, 8, 2, 11

GRU = RouterConfig(
    scorer=Scorer.recurrent, state_dim=8, balance_scope=BalanceScope.sequence, balance_loss=0.05
)
AHEAD = AheadConfig(kind=AheadKind.gru, width=8, heads=2, state=8)
PREGATES = {
    "gru": GRU,
    "pregate": RouterConfig(ahead=AHEAD, balance_loss=0.0, z_loss=0.01),
    "pregate_weights": RouterConfig(
        ahead=replace(AHEAD, weights=AheadWeights.pregate), balance_loss=0.0, z_loss=0.0
    ),
}


def settings(**changed: Any) -> SimpleNamespace:
    """Return what the routers read of Megatron's `TransformerConfig`."""
    return SimpleNamespace(
        **{
            "hidden_size": HIDDEN,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": TOP_K,
            "moe_aux_loss_coeff": 0.0,
            "moe_z_loss_coeff": None,
            "moe_router_enable_expert_bias": False,
            "moe_expert_capacity_factor": None,
            "moe_input_jitter_eps": None,
            "pipeline_model_parallel_size": 1,
            "recompute_granularity": None,
            "recompute_modules": None,
            "sequence_parallel": False,
            **changed,
        }
    )


class Ours(nn.Module):
    """Our layers with residuals around them, as the script stacks Megatron's."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        torch.manual_seed(3)
        cell = build_cell(config, HIDDEN)
        gate = build_pregate(config.ahead, IDS, layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)
        self.config = config
        self.shared = nn.ModuleList([m for m in (cell, gate) if m is not None])
        self.gate = gate
        self.layers = nn.ModuleList(
            MoELayer(
                build_router(config, HIDDEN, EXPERTS, TOP_K, cell=cell, index=index),
                GroupedExperts(EXPERTS, HIDDEN, WIDTH, Activation.swiglu),
                LocalDispatcher(EXPERTS),
            )
            for index in range(LAYERS)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x_BSD: Tensor, token_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the sum of the routers' losses."""
        route: RoutePlan | None = None if self.gate is None else self.gate.plan(token_BS)
        ahead = route and tuple(route.layer(index) for index in range(LAYERS))
        context = RoutingContext(sequences=BATCH, ahead=ahead)
        x_TD, routings = x_BSD.flatten(0, 1), []
        for index, layer in enumerate(self.layers):
            y_TD, routing, context = layer(x_TD, context, index)
            x_TD = x_TD + y_TD
            routings.append(routing)
        if route is not None:
            routings = learn_to_agree(routings, route, self.config.ahead)
        losses = [value for routing in routings for value in routing.losses.values()]
        return x_TD.view_as(x_BSD), torch.stack([*losses, x_TD.new_zeros(())]).sum()

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        shape = (BATCH, POSITIONS, HIDDEN)
        return {
            "x_BSD": torch.randn(shape, generator=generator),
            "pull_BSD": torch.randn(shape, generator=generator),
            "token_BS": torch.randint(IDS, shape[:2], generator=generator),
        }


CASES = [
    ("gru", "alltoall"),
    ("gru", "allgather"),
    ("pregate", "alltoall"),
    ("pregate_weights", "alltoall"),
]


def given(name: str, dispatcher: str) -> dict[str, Any]:
    """Return what the script needs to build Megatron's layers with these routers."""
    ours = Ours(PREGATES[name])
    return {
        **ours.batch(),
        "router": PREGATES[name],
        "dispatcher": dispatcher,
        "top_k": TOP_K,
        "vocab_size": IDS,
        "w_in": [layer.experts.w_in_eGD.detach() for layer in ours.layers],
        "w_out": [layer.experts.w_out_eDF.detach() for layer in ours.layers],
        "routers": [layer.router.state_dict() for layer in ours.layers],
        "shared": [module.state_dict() for module in ours.shared],
    }


def wanted(name: str) -> dict[str, Any]:
    """Return outputs and gradients of our own layers."""
    ours = Ours(PREGATES[name])
    batch = ours.batch()
    x_BSD = batch["x_BSD"].requires_grad_()
    y_BSD, loss = ours(x_BSD, batch["token_BS"])
    ((y_BSD * batch["pull_BSD"]).sum() + loss).backward()
    return {
        "y_BSD": y_BSD.detach(),
        "dx_BSD": x_BSD.grad,
        "w_in": [layer.experts.w_in_eGD.grad for layer in ours.layers],
        "w_out": [layer.experts.w_out_eDF.grad for layer in ours.layers],
        "routers": [
            {n: p.grad for n, p in layer.router.named_parameters()} for layer in ours.layers
        ],
        "shared": [{n: p.grad for n, p in module.named_parameters()} for module in ours.shared],
        "registered": sum(1 for _ in ours.shared.parameters()),
    }


def test_megatrons_layers_with_our_routers_are_our_layers(tmp_path: Path) -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    torch.save([given(*case) for case in CASES], tmp_path / "in.pt")
    script = Path(__file__).parents[1] / "megatron_layer.py"
    places = [str(tmp_path / file) for file in ("store", "in.pt", "out.pt")]
    ran = subprocess.run(
        [sys.executable, str(script), *places], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for (name, dispatcher), theirs in zip(CASES, found, strict=True):
        mine = wanted(name)
        assert theirs.keys() == mine.keys()
        for key, value in mine.items():
            torch.testing.assert_close(
                theirs[key],
                value,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda text, where=(name, dispatcher, key): f"{where}: {text}",
            )
        gradients = [grad for module in mine["shared"] for grad in module.values()]
        assert max(float(grad.abs().max()) for grad in gradients) > 0


def attach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the one function of Megatron's that a router calls."""

    class Scaler:
        @staticmethod
        def apply(values: Tensor, loss: Tensor) -> Tensor:
            return values + 0 * loss

    module = ModuleType("megatron.core.transformer.moe.moe_utils")
    vars(module)["MoEAuxLossAutoScaler"] = Scaler
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("megatron", "megatron.core", "megatron.core.transformer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    name = "megatron.core.transformer.moe"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))


def test_tokens_come_and_go_position_major(monkeypatch: pytest.MonkeyPatch) -> None:
    attach_nothing(monkeypatch)
    routers = MegatronRouters(GRU, layers=1)
    router = routers.build(config=settings())
    x_SBD = torch.randn(POSITIONS, BATCH, HIDDEN)
    weight_TE, chosen_TE = router(x_SBD)
    assert weight_TE.shape == chosen_TE.shape == (POSITIONS * BATCH, EXPERTS)
    assert torch.equal(chosen_TE.sum(1), torch.full((POSITIONS * BATCH,), TOP_K))
    assert torch.equal(weight_TE > 0, chosen_TE)
    for position in range(POSITIONS):
        for sequence in range(BATCH):
            alone_1E, _ = router(x_SBD[position, sequence].view(1, 1, HIDDEN))
            torch.testing.assert_close(weight_TE[position * BATCH + sequence], alone_1E[0])


def test_the_state_runs_over_layers_and_starts_anew_with_each_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attach_nothing(monkeypatch)
    routers = MegatronRouters(GRU, layers=2)
    first, second = (routers.build(config=settings()) for _ in range(2))
    x_SBD = torch.randn(POSITIONS, BATCH, HIDDEN)
    with pytest.raises(RuntimeError, match="before the first one"):
        second(x_SBD)
    results = []
    for pass_ in range(3):
        first(x_SBD if pass_ != 1 else -x_SBD)
        results.append(second(x_SBD)[0])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    with pytest.raises(ValueError, match="one more MoE layer"):
        routers.build(config=settings())


def test_the_bias_moves_by_the_demand_of_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    attach_nothing(monkeypatch)
    config = RouterConfig(bias_rate=0.1, balance_loss=0.0, z_loss=0.0)
    routers = MegatronRouters(config, layers=1)
    router = routers.build(config=settings())
    counts = torch.zeros(EXPERTS)
    for _ in range(2):
        counts += router(torch.randn(POSITIONS, BATCH, HIDDEN))[1].sum(0)
    routers.update()
    bias_E = router.router.bias_E
    expected_E = torch.zeros(EXPERTS)
    update_bias_(expected_E, counts, rate=0.1)
    assert torch.equal(bias_E, expected_E)
    assert bias_E.any()
    before = bias_E.clone()
    routers.update()  # nothing was routed since
    assert torch.equal(router.router.bias_E, before)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RouterConfig(selector=Selector.top_p, balance_loss=0.0), "router.selector is top_p"),
        (RouterConfig(), "balance_scope is global_batch"),
        (RouterConfig(ahead=AHEAD, balance_loss=0.0), "vocab_size is not given"),
    ],
)
def test_routers_that_megatron_cannot_carry_are_refused(config: RouterConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MegatronRouters(config, layers=1)


@pytest.mark.parametrize(
    "changed",
    [
        {"moe_aux_loss_coeff": 0.01},
        {"moe_z_loss_coeff": 0.001},
        {"moe_router_enable_expert_bias": True},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_input_jitter_eps": 0.1},
        {"pipeline_model_parallel_size": 2},
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
)
def test_megatron_settings_that_the_router_would_ignore_are_refused(
    changed: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        MegatronRouters(GRU, layers=1).build(config=settings(**changed))
