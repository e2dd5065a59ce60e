"""Pre-gates choose from the prefix alone, alike in one pass and token by token."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gatewise.routers.ahead.agreement import distillation_loss, mass_recall, recall_at_k
from gatewise.routers.ahead.config import AheadConfig, AheadKind, AheadTrunk, AheadWeights
from gatewise.routers.ahead.plan import RoutePlan, load_routes, record_routes, save_routes
from gatewise.routers.ahead.pregate import GruGate, PreGate, ReadMeGate, build_pregate
from gatewise.routers.ahead.shapes import pregate_parameters
from gatewise.routers.ahead.table import HashGate
from gatewise.routers.ahead.trunk import PrefixCache
from gatewise.routers.api import Routing

VOCAB, LAYERS, EXPERTS, TOP_K = 50, 3, 8, 2
SMALL = AheadConfig(kind=AheadKind.gru, width=16, heads=2, state=12)
CONFIGS = [
    SMALL,
    replace(SMALL, trunk=AheadTrunk.embedding),
    replace(SMALL, kind=AheadKind.read_me),
    replace(SMALL, kind=AheadKind.read_me, per_layer=False),
    replace(SMALL, weights=AheadWeights.pregate),
    AheadConfig(kind=AheadKind.hash),
]
NAMES = ["gru", "gru_embedding", "read_me", "read_me_single", "gru_weights", "hash"]


def make(config: AheadConfig) -> PreGate | HashGate:
    torch.manual_seed(0)
    gate = build_pregate(config, VOCAB, layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K)
    assert gate is not None
    return gate


def tokens(batch: int = 3, positions: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (batch, positions), generator=generator)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_later_ids_do_not_change_the_plan_of_the_prefix(config: AheadConfig) -> None:
    gate, token_BS = make(config), tokens()
    before = gate.plan(token_BS).expert_LTK.view(-1, 3, 11, TOP_K)
    token_BS[:, 6:] = (token_BS[:, 6:] + 7) % VOCAB
    after = gate.plan(token_BS).expert_LTK.view(-1, 3, 11, TOP_K)
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert not torch.equal(before[:, :, 6:], after[:, :, 6:])


@pytest.mark.parametrize("cuts", [(1,) * 11, (4, 1, 6)])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_plan_made_piece_by_piece_equals_the_whole(
    config: AheadConfig, cuts: tuple[int, ...]
) -> None:
    gate, token_BS = make(config), tokens()
    whole = gate.plan(token_BS)
    cache, parts = PrefixCache(), []
    for piece_BS in token_BS.split(cuts, 1):
        part = gate.plan(piece_BS, cache=cache).expert_LTK
        parts.append(part.view(-1, 3, piece_BS.shape[1], TOP_K))
    assert torch.equal(torch.cat(parts, 2).flatten(1, 2), whole.expert_LTK)


@pytest.mark.parametrize("trunk", list(AheadTrunk))
def test_the_gru_pre_gate_is_a_gru_over_layers(trunk: AheadTrunk) -> None:
    gate = make(replace(SMALL, trunk=trunk))
    assert isinstance(gate, GruGate)
    logits_LTE = gate.logits(tokens())
    torch.testing.assert_close(logits_LTE, gate.logits_reference(tokens()), rtol=1e-5, atol=1e-6)
    cell = nn.GRU(12, 12)
    cell.load_state_dict(
        {
            "weight_ih_l0": gate.w_input,
            "weight_hh_l0": gate.w_state,
            "bias_ih_l0": gate.b_input,
            "bias_hh_l0": gate.b_state,
        }
    )
    state_LTH, _ = cell(gate.inputs(tokens()))
    wanted = torch.stack([s @ w.T for s, w in zip(state_LTH, gate.w_head_LEH, strict=True)])
    torch.testing.assert_close(logits_LTE, wanted, rtol=1e-5, atol=1e-6)


def test_the_gru_pre_gate_has_the_gradients_of_its_loop() -> None:
    gate = make(SMALL).double()
    assert isinstance(gate, GruGate)
    weight = torch.randn(LAYERS, 33, EXPERTS, dtype=torch.float64)
    parameters = list(gate.parameters())
    fast = torch.autograd.grad((gate.logits(tokens()) * weight).sum(), parameters)
    slow = torch.autograd.grad((gate.logits_reference(tokens()) * weight).sum(), parameters)
    for have, want in zip(fast, slow, strict=True):
        torch.testing.assert_close(have, want)


def test_a_choice_depends_on_the_prefix_only_with_the_block() -> None:
    for config, alike in ((SMALL, False), (replace(SMALL, trunk=AheadTrunk.embedding), True)):
        logits_LTE = make(config).logits(torch.tensor([[3, 7, 7, 3]]))
        assert torch.equal(logits_LTE[:, 0], logits_LTE[:, 3]) == alike
        assert not torch.allclose(logits_LTE[0], logits_LTE[1])  # layers differ


@pytest.mark.parametrize("config", CONFIGS[:5], ids=NAMES[:5])
def test_parameters_are_counted_from_the_settings(config: AheadConfig) -> None:
    gate = make(config)
    counted = pregate_parameters(config, vocab_size=VOCAB, num_experts=EXPERTS, layers=LAYERS)
    assert counted == sum(parameter.numel() for parameter in gate.parameters())


def test_the_published_router_has_eighteen_million_parameters() -> None:
    config = AheadConfig(kind=AheadKind.read_me, per_layer=False, width=512, heads=4)
    counted = pregate_parameters(config, vocab_size=32000, num_experts=7, layers=32)
    assert counted == 17_965_063  # arXiv:2410.19123, table 1: 18.0 M


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_experts_of_a_token_differ_and_padding_has_none(config: AheadConfig) -> None:
    padding_T = torch.zeros(33, dtype=torch.bool)
    padding_T[-5:] = True
    plan = make(config).plan(tokens(), padding_T=padding_T)
    assert (plan.expert_LTK[:, -5:] == -1).all()
    real = plan.expert_LTK[:, :-5]
    assert 0 <= int(real.min()) <= int(real.max()) < EXPERTS
    assert (real[..., 0] != real[..., 1]).all()
    assert plan.weighs == (config.weights is AheadWeights.pregate)


def test_a_pre_gate_stays_fp32_in_a_model_of_half_precision() -> None:
    gate = make(SMALL)
    holder = nn.Sequential(gate, nn.Linear(2, 2)).bfloat16()
    assert holder[1].weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in gate.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gate.plan(tokens())
    assert inside.digest() == gate.plan(tokens()).digest()


def test_a_digest_is_of_the_experts_in_all_layers() -> None:
    single = make(CONFIGS[3]).plan(tokens())
    assert single.expert_LTK.shape[0] == 1
    routings = [Routing(single.layer(i).expert_TK, torch.ones(33, TOP_K)) for i in range(LAYERS)]
    executed = record_routes(routings, num_experts=EXPERTS)
    assert executed.digest() == single.digest()
    other = executed.expert_LTK.clone()
    other[1, 4, 1] = (other[1, 4, 1] + 1) % EXPERTS
    assert replace(executed, expert_LTK=other).digest() != single.digest()
    assert len(single.digest()) == len(hashlib.sha256().hexdigest())


def test_routes_survive_a_file(tmp_path: Path) -> None:
    ragged = [Routing(torch.tensor([[1, -1], [3, 0]]), torch.ones(2, 2))]
    ragged.append(Routing(torch.tensor([[2], [7]]), torch.ones(2, 1)))
    plan = record_routes(ragged, num_experts=8)
    save_routes(tmp_path / "routes.npz", plan)
    back = load_routes(tmp_path / "routes.npz")
    assert torch.equal(back.expert_LTK, plan.expert_LTK)
    assert back.digest() == plan.digest()
    (tmp_path / "no.npz").write_text("text")
    with pytest.raises(ValueError, match=r"no\.npz holds no recorded route"):
        load_routes(tmp_path / "no.npz")


@pytest.mark.parametrize(
    ("layers", "count", "experts", "message"),
    [
        (4, 33, 8, "made for 3 MoE layers but this batch has 4"),
        (3, 34, 8, "made for 33 tokens but this batch has 34"),
        (3, 33, 16, "made for 8 experts but this batch has 16"),
    ],
)
def test_a_route_of_another_batch_is_refused_in_one_line(
    layers: int, count: int, experts: int, message: str
) -> None:
    plan = make(SMALL).plan(tokens())
    plan.check(layers=3, tokens=33, num_experts=8)
    with pytest.raises(ValueError, match=message) as caught:
        plan.check(layers=layers, tokens=count, num_experts=experts)
    assert "\n" not in str(caught.value)


def test_every_change_of_the_parameters_makes_plans_stale() -> None:
    gate = make(SMALL)
    first = gate.plan(tokens()).version
    gate.advance()
    assert gate.plan(tokens()).version != first


def test_balanced_tables_spread_the_tokens_of_a_text() -> None:
    gate = make(CONFIGS[5])
    assert isinstance(gate, HashGate)
    assert gate.table_LVK.unique().numel() == EXPERTS
    count_V = (1e4 / torch.arange(1, VOCAB + 1) ** 0.7).long()
    before = gate.plan(tokens()).version
    gate.balance(count_V)
    assert gate.plan(tokens()).version != before
    table_LVK = gate.table_LVK.long()
    assert not torch.equal(table_LVK[0], table_LVK[1])
    assert (table_LVK[..., 0] != table_LVK[..., 1]).all()
    for table_VK in table_LVK:
        load = torch.zeros(EXPERTS, dtype=torch.int64)
        load.index_add_(0, table_VK.flatten(), count_V.repeat_interleave(TOP_K))
        assert float(load.max()) / float(load.double().mean()) < 1.1


def test_a_table_of_a_file_is_followed_and_one_of_another_vocabulary_refused(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "table.npy")
    table = np.stack((np.arange(VOCAB) % EXPERTS, (np.arange(VOCAB) + 1) % EXPERTS), 1)
    np.save(path, table)
    sizes = {"layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K}
    gate = build_pregate(CONFIGS[5], VOCAB, **sizes, table=path)
    assert gate is not None
    plan = gate.plan(tokens())
    assert plan.layer(2).expert_TK[:, 0].tolist() == (tokens().flatten() % EXPERTS).tolist()
    with pytest.raises(ValueError, match=r"shape \(50, 2\); it must hold .* \(51, 2\)") as caught:
        build_pregate(CONFIGS[5], VOCAB + 1, **sizes, table=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3, "width": 16}, "heads is 3"),
        ({"heads": 4, "width": 4}, "heads is 4"),
        ({"width": 0}, "width is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"distil": -1.0}, "distil is -1.0"),
        ({"kind": AheadKind.gru, "per_layer": False}, "per_layer is false"),
        ({"kind": AheadKind.hash, "weights": AheadWeights.pregate}, "weights is pregate"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"router.ahead.{message}"):
        AheadConfig(**settings)  # type: ignore[arg-type]


def test_distillation_is_the_divergence_from_the_layers_router() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher_TE = torch.randn(7, EXPERTS, generator=generator, requires_grad=True)
    student_TE = torch.randn(7, EXPERTS, generator=generator, requires_grad=True)
    loss = distillation_loss(teacher_TE, student_TE, temperature=2.0)
    p_TE, q_TE = (teacher_TE / 2).softmax(-1), (student_TE / 2).softmax(-1)
    torch.testing.assert_close(loss, (p_TE * (p_TE / q_TE).log()).sum(-1).mean())
    loss.backward()
    assert teacher_TE.grad is None
    assert student_TE.grad is not None
    torch.testing.assert_close(student_TE.grad, (q_TE - p_TE).detach() / 2 / 7)
    shifted_TE = teacher_TE.detach() + 3.0
    assert distillation_loss(teacher_TE, shifted_TE).item() == pytest.approx(0.0, abs=1e-6)
    padding_T = torch.arange(7) >= 4
    nan_TE = torch.where(padding_T.unsqueeze(1), torch.nan, teacher_TE.detach())
    padded = distillation_loss(nan_TE, student_TE.detach(), padding_T=padding_T)
    whole = distillation_loss(teacher_TE[:4], student_TE[:4].detach())
    torch.testing.assert_close(padded, whole)


def test_recalls_are_shares_of_the_routers_own_choice() -> None:
    wanted_TK = torch.tensor([[0, 1], [2, 3], [4, -1]])
    chosen_TK = torch.tensor([[1, 0], [3, 7], [5, 6]])
    assert recall_at_k(wanted_TK, chosen_TK).item() == pytest.approx(1.5)
    score_TE = torch.full((3, 8), 0.1)
    score_TE[0, 1] = 0.3
    assert mass_recall(score_TE, chosen_TK).item() == pytest.approx(0.4 + 0.2 + 0.2)
    padding_T = torch.tensor([True, False, False])
    assert recall_at_k(wanted_TK, chosen_TK, padding_T=padding_T).item() == pytest.approx(0.5)
    assert mass_recall(score_TE, chosen_TK, padding_T=padding_T).item() == pytest.approx(0.4)


def test_a_plan_of_one_decision_serves_all_layers() -> None:
    plan = RoutePlan(torch.zeros(1, 4, 1, dtype=torch.int64), 2, 5)
    assert plan.layer(4).expert_TK is not None
    gate = make(CONFIGS[3])
    assert isinstance(gate, ReadMeGate)
    assert gate.plan(tokens()).layer(0).logits_TE is not None
