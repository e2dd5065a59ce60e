"""The same experts and weights as the routers of transformers and Megatron-core, where installed.

Megatron-core's router wants a GPU; a few of its calls are pointed at the CPU for the test, in a
process of its own, so that nothing else sees it.
"""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from gatewise.routers.api import RoutingContext
from gatewise.routers.config import RouterConfig, ScoreFunction
from gatewise.routers.presets import preset
from gatewise.routers.router import build_router

TOKENS, HIDDEN, EXPERTS, TOP_K = 300, 48, 16, 4


def ours(config: RouterConfig, weight_ED: Tensor, x_TD: Tensor, bias_E: Tensor | None = None):  # type: ignore[no-untyped-def]
    router = build_router(config, HIDDEN, EXPERTS, TOP_K).eval()
    with torch.no_grad():
        router.weight.copy_(weight_ED)
        if bias_E is not None:
            router.bias_E.copy_(bias_E)
        routing, _ = router(x_TD, RoutingContext(), 0)
    return routing.expert_TK, routing.weight_TK


def draw() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight_ED = torch.randn(EXPERTS, HIDDEN, generator=generator) * 0.2
    return weight_ED, torch.randn(TOKENS, HIDDEN, generator=generator)


def assert_agree(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Compare indices exactly and weights to 1e-6, whatever the order of a token's experts."""
    order_TK, their_TK = mine[0].argsort(1), theirs[0].argsort(1)
    assert torch.equal(mine[0].gather(1, order_TK), theirs[0].gather(1, their_TK))
    torch.testing.assert_close(
        mine[1].gather(1, order_TK), theirs[1].gather(1, their_TK), rtol=0, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_softmax_routers_of_transformers_agree(family: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    if family == "mixtral":
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as Theirs

        settings = MixtralConfig(
            hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
        )
        config = preset("mixtral")
    elif family == "qwen3_moe":
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Theirs

        settings = Qwen3MoeConfig(
            hidden_size=HIDDEN,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            norm_topk_prob=True,
        )
        config = preset("qwen3")
    else:
        from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter as Theirs

        settings = OlmoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
        assert settings.norm_topk_prob is False
        config = RouterConfig(renormalise=False)
    weight_ED, x_TD = draw()
    theirs: nn.Module = Theirs(settings)
    with torch.no_grad():
        theirs.weight.copy_(weight_ED)
        _, their_weight_TK, their_expert_TK = theirs(x_TD)
    assert_agree(ours(config, weight_ED, x_TD), (their_expert_TK, their_weight_TK))


@pytest.mark.filterwarnings("ignore")
def test_the_deepseek_v3_router_of_transformers_agrees_with_groups_and_bias() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    settings = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    weight_ED, x_TD = draw()
    bias_E = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(1)) * 0.3
    theirs = DeepseekV3TopkRouter(settings)
    with torch.no_grad():
        theirs.weight.copy_(weight_ED)
        theirs.e_score_correction_bias.copy_(bias_E)
        found = theirs(x_TD)
    expert_TK = next(t for t in found if t.dtype == torch.int64)
    weight_TK = next(t for t in found if t.dtype != torch.int64 and t.shape == expert_TK.shape)
    config = preset("deepseek_v3")
    config.num_groups, config.top_groups = 4, 2
    assert_agree(ours(config, weight_ED, x_TD, bias_E), (expert_TK, weight_TK))


_MEGATRON = """
import warnings; warnings.filterwarnings("ignore")
import sys, torch, torch.distributed as dist
torch.cuda.current_device = lambda: "cpu"
torch.Tensor.cuda = lambda tensor, *_, **__: tensor
torch.nn.Module.cuda = lambda module, *_, **__: module
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
from megatron.core import parallel_state
parallel_state.initialize_model_parallel()
from megatron.core.transformer.moe import moe_utils
moe_utils.te_general_gemm = None
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
weight, x, bias = torch.load(sys.argv[2])
results = []
for score, groups, pre in (
    ("softmax", None, False), ("softmax", None, True), ("sigmoid", 4, False)
):
    config = TransformerConfig(
        num_layers=1, hidden_size=x.shape[1], num_attention_heads=2,
        num_moe_experts=weight.shape[0], moe_router_topk=4, moe_router_score_function=score,
        moe_router_pre_softmax=pre, moe_router_dtype="fp32", moe_aux_loss_coeff=0.0,
        moe_router_load_balancing_type="none", moe_router_num_groups=groups,
        moe_router_group_topk=2 if groups else None, moe_router_enable_expert_bias=bool(groups),
        moe_router_topk_scaling_factor=2.5 if groups else None, use_cpu_initialization=True,
        add_bias_linear=False,
    )
    groups_of = ProcessGroupCollection.use_mpu_process_groups()
    router = TopKRouter(config=config, pg_collection=groups_of).eval()
    with torch.no_grad():
        router.weight.copy_(weight)
        if groups:
            router.expert_bias.copy_(bias)
        probs, chosen = router(x.unsqueeze(1))
    results.append((probs.view(x.shape[0], -1), chosen.view(x.shape[0], -1)))
torch.save(results, sys.argv[3])
"""


def test_the_megatron_core_router_agrees(tmp_path) -> None:  # type: ignore[no-untyped-def]
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    weight_ED, x_TD = draw()
    bias_E = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(1)) * 0.3
    torch.save((weight_ED, x_TD, bias_E), tmp_path / "in.pt")
    script = tmp_path / "megatron_router.py"
    script.write_text(_MEGATRON)
    places = [str(tmp_path / name) for name in ("store", "in.pt", "out.pt")]
    ran = subprocess.run(
        [sys.executable, str(script), *places], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    results = torch.load(tmp_path / "out.pt", weights_only=True)
    # its group score is the sum of a group's best top_k / groups = 2 experts, as ours
    grouped = RouterConfig(score=ScoreFunction.sigmoid, scale=2.5, num_groups=4, top_groups=2)
    for config, bias, (probs_TE, chosen_TE) in zip(
        (RouterConfig(), RouterConfig(renormalise=False), grouped),
        (None, None, bias_E),
        results,
        strict=True,
    ):
        expert_TK, weight_TK = ours(config, weight_ED, x_TD, bias)
        mine_TE = torch.zeros(TOKENS, EXPERTS).scatter(1, expert_TK, weight_TK)
        assert torch.equal(torch.zeros_like(chosen_TE).scatter(1, expert_TK, True), chosen_TE)
        torch.testing.assert_close(mine_TE, probs_TE, rtol=0, atol=1e-6)
