"""Routers fitted to quantised weights: they agree at least as well, and stay alone otherwise."""

import json
from pathlib import Path

import pytest
import torch
from compressed_models import compressed, settings, trained, weights
from torch import Tensor, nn

from gatewise.compression.config import (
    Allocation,
    CompressConfig,
    Method,
    Repair,
    RepairConfig,
    TextConfig,
)
from gatewise.compression.observe import Seen
from gatewise.compression.repair import RouterTarget, check_repairable, fit_router
from gatewise.compression.work import Source
from gatewise.launch.restore import open_checkpoint, restore_model
from gatewise.parallel.errors import ConfigError
from gatewise.routers.api import RoutingContext
from gatewise.routers.config import RouterConfig
from gatewise.routers.presets import preset
from gatewise.routers.router import ComposedRouter


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return trained(tmp_path_factory.mktemp("model"))[0]


def quick(repair: RepairConfig | None = None) -> CompressConfig:
    """Return settings without costs, gradients and feedback."""
    return settings(
        allocation=Allocation.uniform,
        method=Method.rtn,
        bits=1.8,
        repair=repair or RepairConfig(),
        text=TextConfig(evaluate=False),
    )


def routers_of(path: Path) -> dict[str, Tensor]:
    model = restore_model(open_checkpoint(str(path)), device=torch.device("cpu"))
    return {name: weight for name, weight in weights(model).items() if "router" in name}


def router_and_inputs(noise: float) -> tuple[ComposedRouter, Seen, RouterTarget]:
    torch.manual_seed(0)
    router = ComposedRouter(12, 6, 2, RouterConfig()).eval()
    nn.init.normal_(router.weight)
    x_TD = torch.randn(400, 12)
    with torch.no_grad():
        routing, _ = router(x_TD, RoutingContext(), 0)
    assert routing.logits_TE is not None
    target = RouterTarget(routing.expert_TK, routing.logits_TE)
    moved_TD = x_TD @ (torch.eye(12) + noise * torch.randn(12, 12))
    return router, Seen(moved_TD, (400,)), target


def test_c33_a_fitted_router_agrees_at_least_as_well() -> None:
    for noise in (0.0, 0.05, 0.3, 1.0):
        router, seen, target = router_and_inputs(noise)
        found = fit_router(router, seen, target, ridge=1e-3)
        assert found["agreement_after"] >= found["agreement_before"]
        routing, _ = router(seen.x_TD, RoutingContext(), 0)
        same = (routing.expert_TK.unsqueeze(2) == target.expert_TK.unsqueeze(1)).any(1)
        assert float(same.float().mean()) == pytest.approx(found["agreement_after"])
        if noise == 0.3:
            assert found["agreement_after"] > found["agreement_before"] + 0.05


def test_c33_inputs_that_did_not_move_leave_the_router() -> None:
    router, seen, target = router_and_inputs(0.0)
    before_ED = router.weight.detach().clone()
    assert fit_router(router, seen, target, ridge=1.0)["step"] == 0
    assert torch.equal(router.weight, before_ED)


def test_c33_routers_stay_bit_for_bit_unless_they_are_repaired(
    source: Source, tmp_path: Path
) -> None:
    original = routers_of(source.path)
    plain, _ = compressed(source, quick(), tmp_path / "plain")
    assert original.keys() == routers_of(plain).keys()
    assert all(torch.equal(routers_of(plain)[name], part) for name, part in original.items())
    fit = quick(RepairConfig(rule=Repair.topk_mse))
    fitted, report = compressed(source, fit, tmp_path / "fitted")
    assert report["repair"].keys() == {"0", "1"}
    for row in report["repair"].values():
        assert row["agreement_after"] >= row["agreement_before"]
    changed = [not torch.equal(routers_of(fitted)[n], part) for n, part in original.items()]
    assert changed == [row["step"] > 0 for row in report["repair"].values()]


def test_cross_entropy_changes_the_routers_alone_and_never_for_the_worse(
    source: Source, tmp_path: Path
) -> None:
    plain, _ = compressed(source, quick(), tmp_path / "plain")
    config = RepairConfig(rule=Repair.cross_entropy, rate=3e-3, epochs=2)
    path, report = compressed(source, quick(config), tmp_path / "trained")
    found = report["repair"]
    assert found["loss_after"] < found["loss_before"]
    before = weights(restore_model(open_checkpoint(str(plain)), device=torch.device("cpu")))
    after = weights(restore_model(open_checkpoint(str(path)), device=torch.device("cpu")))
    for name, part in before.items():
        assert torch.equal(part, after[name]) == ("router" not in name), name
    record = json.loads((path / "report.json").read_text())
    assert record["bytes"]["computed"] == record["bytes"]["on_disk"]


def test_routers_that_cannot_be_fitted_are_refused() -> None:
    with pytest.raises(ConfigError, match="scorer=recurrent"):
        check_repairable(preset("rmoe"), Repair.topk_mse)
    with pytest.raises(ConfigError, match="a pre-gate chooses"):
        check_repairable(preset("gru_pregate"), Repair.cross_entropy)
    check_repairable(preset("rmoe"), Repair.cross_entropy)
    for name in ("moe_x", "hash"):
        with pytest.raises(
            ConfigError, match=r"trains the routers' weights; .* have none \(scorer="
        ):
            check_repairable(preset(name), Repair.cross_entropy)
        with pytest.raises(ConfigError, match=r"topk_mse, .*: use none"):
            check_repairable(preset(name), Repair.topk_mse)
    with pytest.raises(ConfigError, match=r"repair\.rate is 0"):
        RepairConfig(rate=0.0)
