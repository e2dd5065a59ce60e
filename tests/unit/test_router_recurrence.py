"""RMoE: the recurrence over layers, T13.

The properties of routers are numbered: T0 to T4 in `test_router_choice.py`, T5 and T7 to T9 in
`test_router_losses.py`, T10 to T12 in `test_router_balancing.py`, T13 in
`test_router_recurrence.py`, T14 and T15 in `test_router_state.py`, T6 in
`tests/distributed/test_router_ranks.py`.

Shapes:  T tokens   E experts   K experts per token   D width
"""

import copy

import pytest
import torch
from router_cases import FAMILY, VOCAB, D, E, K, decoder, token_ids, tokens
from small_models import small_model
from torch import Tensor, nn

from gatewise.moe import MoE
from gatewise.moe.config import ModelConfig, count_parameters
from gatewise.moe.model import Block, Decoder, parameter_specs
from gatewise.routers.api import RoutingContext
from gatewise.routers.config import (
    Cell,
    Recurrence,
    RouterConfig,
    RouterStart,
    Scorer,
)
from gatewise.routers.recurrent import RecurrentCell
from gatewise.routers.router import ComposedRouter, build_cell, build_router
from gatewise.routers.shapes import router_parameters

# --- T13: RMoE


def chain(config: RouterConfig, layers: int = 4) -> list[ComposedRouter]:
    torch.manual_seed(2)
    cell = build_cell(config, D)
    return [build_router(config, D, E, K, cell=cell, index=i).double() for i in range(layers)]


def logits_of(routers: list[ComposedRouter], inputs: list[Tensor]) -> list[Tensor]:
    context, found = RoutingContext(), []
    for layer, (router, x_TD) in enumerate(zip(routers, inputs, strict=True)):
        routing, context = router(x_TD, context, layer)
        assert routing.logits_TE is not None
        found.append(routing.logits_TE)
    return found


def recurrent(**settings: object) -> RouterConfig:
    return RouterConfig(scorer=Scorer.recurrent, state_dim=8, z_loss=0.0, **settings)  # type: ignore[arg-type]


def layer_inputs(layers: int = 4) -> list[Tensor]:
    return [tokens(5, 20 + i).double().requires_grad_() for i in range(layers)]


def as_double(routers: list[ComposedRouter]) -> RecurrentCell:
    (cell,) = routers[0]._shared
    assert cell is not None
    return cell.double()  # type: ignore[return-value]  # torch returns the module


@pytest.mark.parametrize(
    ("cell", "reference"),
    [(Cell.gru, nn.GRUCell), (Cell.rnn, nn.RNNCell), (Cell.lstm, nn.LSTMCell)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_t13_logits_are_those_of_torchs_cell_run_over_the_layers(
    cell: Cell, reference: type, shared: bool
) -> None:
    routers, inputs = chain(recurrent(cell=cell, shared_projection=shared)), layer_inputs()
    ours, theirs = as_double(routers), reference(D if shared else 8, 8).double()
    theirs.load_state_dict(ours.state_dict())
    state = None
    for router, x_TD, logits_TE in zip(routers, inputs, logits_of(routers, inputs), strict=True):
        read = x_TD if shared else x_TD @ router.projection.T
        state = theirs(read, state)
        hidden = state[0] if cell is Cell.lstm else state
        torch.testing.assert_close(logits_TE, hidden @ router.weight.T)


def test_t13_the_gru_is_the_written_formula() -> None:
    (router,), (x_TD,) = chain(recurrent(), 1), layer_inputs(1)
    cell, h_TH = as_double([router]), tokens(5, 40, width=8).double()
    read_TH = x_TD @ router.projection.T
    w_r, w_z, w_n = cell.weight_ih.chunk(3)
    u_r, u_z, u_n = cell.weight_hh.chunk(3)
    bi_r, bi_z, bi_n = cell.bias_ih.chunk(3)
    bh_r, bh_z, bh_n = cell.bias_hh.chunk(3)
    r_TH = torch.sigmoid(read_TH @ w_r.T + bi_r + h_TH @ u_r.T + bh_r)
    z_TH = torch.sigmoid(read_TH @ w_z.T + bi_z + h_TH @ u_z.T + bh_z)
    n_TH = torch.tanh(read_TH @ w_n.T + bi_n + r_TH * (h_TH @ u_n.T + bh_n))
    want_TH = (1 - z_TH) * n_TH + z_TH * h_TH
    _, context = router(x_TD, RoutingContext(state_TH=h_TH), 0)
    torch.testing.assert_close(context.state_TH, want_TH)


def reached(recurrence: Recurrence) -> list[bool]:
    routers, inputs = chain(recurrent(recurrence=recurrence)), layer_inputs()
    as_double(routers)
    last_TE = logits_of(routers, inputs)[-1]
    grads = torch.autograd.grad(last_TE.square().sum(), inputs, allow_unused=True)
    return [grad is not None and bool(grad.any()) for grad in grads]


def test_t13_the_recurrence_reaches_all_earlier_layers_and_its_controls_none() -> None:
    assert reached(Recurrence.full) == [True] * 4
    assert reached(Recurrence.detach) == [False] * 3 + [True]
    assert reached(Recurrence.none) == [False] * 3 + [True]


def test_t13_detaching_changes_no_value_and_leaving_the_state_out_does() -> None:
    full, cut, none = (chain(recurrent(recurrence=kind)) for kind in Recurrence)
    inputs = layer_inputs()
    for routers in (full, cut, none):
        as_double(routers)
    wanted, found = logits_of(full, inputs), logits_of(cut, inputs)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    other = logits_of(none, inputs)
    assert torch.equal(other[0], wanted[0])
    assert not torch.equal(other[1], wanted[1])


def test_t13_residual_scores_add_a_share_of_the_previous_layers_own_logits() -> None:
    inputs = layer_inputs()
    plain = chain(recurrent(recurrence=Recurrence.none))
    residual = chain(recurrent(recurrence=Recurrence.none, residual_scores=0.5))
    as_double(plain), as_double(residual)
    own, mixed = logits_of(plain, inputs), logits_of(residual, inputs)
    torch.testing.assert_close(mixed[0], own[0])
    for layer in (1, 2, 3):
        torch.testing.assert_close(mixed[layer], own[layer] + 0.5 * own[layer - 1])
    with_state = chain(recurrent(residual_scores=0.5))
    both = logits_of(with_state, [x.detach() for x in inputs[:1]] * 4)
    assert all(torch.isfinite(logits_TE).all() for logits_TE in both)


def test_t13_gradients_of_the_shared_cell_are_the_sum_over_copies_of_it() -> None:
    routers, inputs = chain(recurrent()), layer_inputs()
    shared = as_double(routers)
    copies = [copy.deepcopy(shared) for _ in routers]
    total = sum(logits_TE.square().sum() for logits_TE in logits_of(routers, inputs))
    want = torch.autograd.grad(total, list(shared.parameters()))
    for router, cell in zip(routers, copies, strict=True):
        router._shared = (cell,)
    total = sum(logits_TE.square().sum() for logits_TE in logits_of(routers, inputs))
    total.backward()
    for index, gradient in enumerate(want):
        parts = [list(cell.parameters())[index].grad for cell in copies]
        torch.testing.assert_close(gradient, torch.stack(parts).sum(0))


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_t13_blocks_in_two_pieces_with_the_state_handed_over_give_the_same_bits(
    dense: int, cut: int
) -> None:
    """What pipeline stages do: the payload between them is (x, state)."""
    model, ids_BS = decoder("rmoe", layers=4, dense=dense), token_ids()
    whole = model(ids_BS)
    from gatewise.moe.rotary import rotary_tables

    rotary = rotary_tables(8, D // 2, model.config.rope_base, start=0, device=ids_BS.device)
    context = RoutingContext(token_ids=ids_BS.flatten(), sequences=2)
    x_BSD = torch.nn.functional.embedding(ids_BS, model.embedding)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    experts = []
    for piece in (blocks[:cut], blocks[cut:]):
        state_TH = context.state_TH  # all that crosses the boundary beside x
        context = RoutingContext(token_ids=ids_BS.flatten(), sequences=2, state_TH=state_TH)
        for block in piece:
            x_BSD, routing, context = block(x_BSD, context, rotary, None)
            experts += [] if routing is None else [routing.expert_TK]
    assert torch.equal(model.norm_final(x_BSD), whole.hidden_BSD)
    assert all(torch.equal(a, b.expert_TK) for a, b in zip(experts, whole.routings, strict=True))


def test_t13_the_state_does_not_notice_drops() -> None:
    torch.manual_seed(0)
    states = []
    for factor in (None, 0.25):
        layer = MoE(D, 4, E, K, router="rmoe", capacity_factor=factor).train()
        nn.init.constant_(layer.router.weight, 0.1)  # type: ignore[attr-defined]
        for number, parameter in enumerate(layer.router_cell.parameters()):  # type: ignore[union-attr]
            parameter.data.copy_(tokens(1, number, parameter.numel()).view_as(parameter))
        layer.router.projection.data.copy_(tokens(128, 9))  # type: ignore[attr-defined]
        states.append(layer.layer(tokens(30), RoutingContext(), 0)[2].state_TH)
    assert torch.equal(states[0], states[1])


def test_t13_the_cell_is_one_module_at_the_root_and_trains() -> None:
    model = decoder("rmoe", layers=3, state_dim=8)
    names = [name for name, _ in model.named_parameters() if "_hh" in name or "_ih" in name]
    assert sorted(names) == [
        f"router_cell.{name}" for name in ("bias_hh", "bias_ih", "weight_hh", "weight_ih")
    ]
    model(token_ids()).hidden_BSD.square().sum().backward()
    assert all(parameter.grad.any() for parameter in model.router_cell.parameters())
    labels = {spec.name: spec for spec in parameter_specs(model)}
    assert {labels[name].label for name in names} == {"router"}
    assert [labels[f"router_cell.{n}"].decay for n in ("weight_hh", "bias_hh")] == [True, False]


@pytest.mark.parametrize("cell", list(Cell))
@pytest.mark.parametrize("shared", [False, True])
def test_t13_logits_start_as_large_as_a_linear_routers_or_as_the_release(
    cell: Cell, shared: bool
) -> None:
    hidden, layers = 256, 12
    stds = {}
    for start in RouterStart:
        config = RouterConfig(
            scorer=Scorer.recurrent, cell=cell, shared_projection=shared, start=start
        )
        sizes = ModelConfig(layers=layers, hidden=hidden, heads=2, num_experts=16, expert_width=1)
        model = small_model(
            sizes,
            config,
            vocab_size=4,
        )
        inputs = [tokens(64, i, width=hidden) for i in range(layers)]
        found = logits_of(model.routers(), inputs)
        stds[start] = float(torch.stack(found).detach().std())
    linear = 0.02 * hidden**0.5
    assert stds[RouterStart.matched] == pytest.approx(linear, rel=0.2)
    assert stds[RouterStart.release] < linear / 4


@pytest.mark.parametrize(
    ("settings", "sizes", "want"),
    [
        ({}, (8, 352, 16), 475_904),
        ({"scorer": Scorer.linear}, (8, 352, 16), 45_056),
        ({}, (24, 1280, 16), 4_080_384),
        ({"scorer": Scorer.linear}, (24, 1280, 16), 491_520),
        ({"scorer": Scorer.mlp}, (8, 352, 16), 753_664),
        ({"cell": Cell.rnn}, (8, 352, 16), 409_856),
        ({"cell": Cell.lstm}, (8, 352, 16), 508_928),
        ({"shared_projection": True}, (8, 352, 16), 201_472),
        ({"recurrence": Recurrence.none}, (8, 352, 16), 475_904),
    ],
)
def test_t13_router_parameters_are_the_published_numbers(
    settings: dict[str, object], sizes: tuple[int, int, int], want: int
) -> None:
    layers, hidden, num_experts = sizes
    config = RouterConfig(**{"scorer": Scorer.recurrent, "state_dim": 128, **settings})  # type: ignore[arg-type]
    count = router_parameters(config, hidden=hidden, num_experts=num_experts, layers=layers)
    assert count == want
    model_config = ModelConfig(
        layers=layers, hidden=hidden, heads=8, num_experts=num_experts, expert_width=8
    )
    assert count_parameters(model_config, 256, config).router == want
    with torch.device("meta"):
        model = Decoder(model_config, config, 256)
    specs = parameter_specs(model)
    assert sum(s.parameter.numel() for s in specs if s.label == "router") == want


def test_t13b_true_means_padding() -> None:
    x_BPD = tokens(12).view(2, 6, D)
    padding_BP = torch.zeros(2, 6, dtype=torch.bool)
    padding_BP[:, 4:] = True
    spoilt_BPD = x_BPD.masked_fill(padding_BP.unsqueeze(2), float("nan"))
    for name in FAMILY:
        torch.manual_seed(0)
        layer = MoE(D, 4, E, K, router=name, vocab_size=VOCAB).eval()
        ids_BP = torch.arange(12).view(2, 6)
        y_BPD = layer(spoilt_BPD, padding_BP, ids_BP)
        assert torch.isfinite(y_BPD).all(), name
        assert not y_BPD[padding_BP].any(), name
        assert y_BPD[~padding_BP].any() or name == "remoe", name
