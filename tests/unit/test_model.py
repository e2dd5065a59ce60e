"""The decoder: sizes, attention, initial values, precision and the key-value cache."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import Tensor

from gatewise.moe.attention import Attention, KeyValueCache, RMSNorm
from gatewise.moe.config import Activation, ModelConfig, count_parameters
from gatewise.moe.model import Decoder, parameter_specs, set_precision
from gatewise.moe.rotary import rotary_tables
from gatewise.routers.api import RoutingContext
from gatewise.routers.config import RouterConfig

VOCAB = 11
CONFIGS = {
    "all layers with experts": ModelConfig(layers=2, hidden=16, heads=2, expert_width=12),
    "dense": ModelConfig(layers=3, hidden=16, heads=4, num_experts=0, dense_width=20),
    "one dense layer, then every second": ModelConfig(
        layers=5, hidden=16, heads=4, kv_heads=2, dense_layers=1, moe_every=2, expert_width=6
    ),
    "shared experts, free head, gelu": ModelConfig(
        layers=2,
        hidden=24,
        heads=2,
        kv_heads=1,
        num_experts=4,
        top_k=3,
        shared_experts=2,
        activation=Activation.gelu,
        qk_norm=False,
        tie_embeddings=False,
    ),
}


def build(config: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    return small_model(
        config,
        RouterConfig(),
        vocab_size=VOCAB,
        dtype=dtype,
        seed=seed,
    )


def tokens(batch: int, positions: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (batch, positions), generator=generator)


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_parameters_are_those_of_the_built_model(name: str) -> None:
    config = CONFIGS[name]
    model = build(config)
    counts = count_parameters(config, VOCAB)
    assert counts.total == sum(p.numel() for p in model.parameters())
    router = [p.numel() for n, p in model.named_parameters() if n.endswith("router.weight")]
    assert counts.router == sum(router)
    idle = 0
    for layer in model.moe_layers():
        weights = (layer.experts.w_in_eGD, layer.experts.w_out_eDF)
        per_expert = sum(w[0].numel() for w in weights)
        idle += (config.num_experts - config.top_k) * per_expert
    assert counts.active == counts.total - idle
    assert sum(math.prod(spec.shape) for spec in parameter_specs(model)) == counts.total


def test_layers_with_experts_are_the_configured_ones() -> None:
    config = CONFIGS["one dense layer, then every second"]
    assert config.moe_layers() == [2, 4]
    assert len(build(config).moe_layers()) == 2
    assert CONFIGS["dense"].moe_layers() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "model.layers is 0"),
        ({"hidden": 30, "heads": 4}, "model.heads is 4, which does not divide"),
        ({"hidden": 12, "heads": 4}, "even width per head"),
        ({"heads": 4, "kv_heads": 3}, "model.kv_heads is 3"),
        ({"num_experts": 4, "top_k": 5}, "model.top_k is 5"),
        ({"dense_width": 0}, "model.dense_width is 0"),
        ({"shared_experts": -1}, "model.shared_experts is -1"),
    ],
)
def test_sizes_that_cannot_be_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)  # type: ignore[arg-type]


def test_a_norm_divides_by_the_root_of_the_mean_square_in_fp32() -> None:
    norm = RMSNorm(64, 1e-6)
    norm.gain.data.uniform_(0.5, 1.5)
    x = torch.randn(5, 64)
    by_hand = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.gain
    torch.testing.assert_close(norm(x), by_hand)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    # values whose squares bf16 could not sum
    torch.testing.assert_close(
        norm(x.bfloat16()).float(), norm(x.bfloat16().float()), rtol=2**-8, atol=0
    )


def slow_attention(layer: Attention, x_SD: Tensor) -> Tensor:
    """One sequence, one head and one position at a time."""
    width, heads, kv_heads = layer.head_width, layer.heads, layer.kv_heads
    rows = x_SD @ layer.w_qkv.T
    out = []
    for head in range(heads):
        share = head // (heads // kv_heads)
        q, k, v = (
            rows[:, start * width : (start + 1) * width]
            for start in (head, heads + share, heads + kv_heads + share)
        )
        q, k = turn(layer.norm_q(q)), turn(layer.norm_k(k))
        for position in range(len(x_SD)):
            score = (k[: position + 1] @ q[position]) / math.sqrt(width)
            out.append(score.softmax(0) @ v[: position + 1])
    mixed = torch.stack(out).view(heads, len(x_SD), width).transpose(0, 1).flatten(1)
    return mixed @ layer.w_out.T


def turn(x_SW: Tensor) -> Tensor:
    """Rotate the pair (i, i + W/2) of position s by s / 10000^(2i/W), one value at a time."""
    half = x_SW.shape[1] // 2
    rows = []
    for position, x_W in enumerate(x_SW):
        new = [torch.zeros(())] * (2 * half)
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / (2 * half))
            cosine, sine = math.cos(angle), math.sin(angle)
            new[i] = x_W[i] * cosine - x_W[i + half] * sine
            new[i + half] = x_W[i + half] * cosine + x_W[i] * sine
        rows.append(torch.stack(new))
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_the_slow_one(heads: int, kv_heads: int, qk_norm: bool) -> None:
    torch.manual_seed(0)
    sizes = ModelConfig(hidden=16, heads=heads, kv_heads=kv_heads, qk_norm=qk_norm)
    layer = Attention(sizes, 0)
    for parameter in layer.parameters():
        parameter.data.uniform_(-1, 1)
    x_BSD = torch.randn(2, 5, 16)
    y_BSD = layer(x_BSD, rotary_tables(5, 4, 10000.0, device=x_BSD.device), 0)
    for x_SD, y_SD in zip(x_BSD, y_BSD, strict=True):
        torch.testing.assert_close(y_SD, slow_attention(layer, x_SD), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_position_sees_a_later_one_and_no_sequence_another(name: str) -> None:
    model = build(CONFIGS[name], dtype=torch.float64).eval()
    token_BS = tokens(2, 8)
    changed_BS = token_BS.clone()
    changed_BS[0, 5] = (changed_BS[0, 5] + 1) % VOCAB
    before, after = model(token_BS).hidden_BSD, model(changed_BS).hidden_BSD
    torch.testing.assert_close(after[0, :5], before[0, :5], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
    assert ((after[0, 5:] - before[0, 5:]).abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("parts", [[8], [1] * 8, [3, 1, 4], [5, 3]])
def test_a_cache_gives_what_the_whole_sequence_gives(name: str, parts: list[int]) -> None:
    model = build(CONFIGS[name], dtype=torch.float64).eval()
    token_BS = tokens(2, 8)
    cache, pieces, first = KeyValueCache(), [], 0
    for length in parts:
        pieces.append(model(token_BS[:, first : first + length], cache=cache).hidden_BSD)
        first += length
        assert cache.length == first
    torch.testing.assert_close(torch.cat(pieces, 1), model(token_BS).hidden_BSD, rtol=0, atol=1e-9)


def test_initial_values_follow_from_seed_name_and_expert() -> None:
    config = ModelConfig(layers=2, hidden=64, heads=4, expert_width=64, init_std=0.02)
    model, again, other = build(config), build(config), build(config, seed=1)
    for (name, value), (_, same), (_, new) in zip(
        model.named_parameters(), again.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(value, same)
        if name.endswith("gain"):
            assert (value == 1).all()
            continue
        assert not torch.equal(value, new)
        residual = name.rpartition(".")[2] in ("w_out", "w_out_eDF")
        std = 0.02 / math.sqrt(4) if residual else 0.02
        assert float(value.detach().std()) == pytest.approx(std, rel=0.1), name
        assert abs(float(value.detach().mean())) < 0.1 * std, name


def test_tied_embeddings_are_the_output_weights() -> None:
    model = build(CONFIGS["dense"])
    hidden = torch.randn(3, 16)
    assert torch.equal(model.logits(hidden), F.linear(hidden, model.embedding))
    free = build(CONFIGS["shared experts, free head, gelu"])
    assert free.head is not None
    assert free.output_weight is free.head


def test_small_types_spare_routers_and_norms() -> None:
    model = build(CONFIGS["all layers with experts"], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        keep = name.endswith("gain") or "router" in name
        assert parameter.dtype == (torch.float32 if keep else torch.bfloat16), name
    set_precision(model, torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_router_is_told_what_the_model_knows() -> None:
    model = build(CONFIGS["all layers with experts"])
    seen: list[RoutingContext] = []
    router = model.moe_layers()[0].router
    router.register_forward_pre_hook(  # type: ignore[attr-defined]
        lambda _, arguments: seen.append(arguments[1])
    )
    token_BS = tokens(2, 3)
    padding_T = torch.zeros(6, dtype=torch.bool)
    model(token_BS, RoutingContext(padding_T=padding_T))
    assert seen[0].sequences == 2
    assert torch.equal(seen[0].token_ids, token_BS.flatten())  # type: ignore[arg-type]
    assert seen[0].padding_T is padding_T


def test_one_routing_is_returned_for_each_layer_with_experts() -> None:
    for config in CONFIGS.values():
        output = build(config)(tokens(2, 3))
        assert len(output.routings) == len(config.moe_layers())
        assert all(routing.expert_TK.shape == (6, config.top_k) for routing in output.routings)


def test_parameters_carry_their_kind_and_their_place() -> None:
    specs = parameter_specs(build(CONFIGS["shared experts, free head, gelu"]))
    labels = {spec.name: spec.label for spec in specs}
    assert labels["embedding"] == "embedding"
    assert labels["head"] == "dense"
    assert labels["blocks.0.feed_forward.router.weight"] == "router"
    assert labels["blocks.0.feed_forward.experts.w_in_eGD"] == "expert"
    assert labels["blocks.0.feed_forward.shared.w_in_GD"] == "dense"
    for spec in specs:
        assert spec.decay == (spec.parameter.dim() > 1 and spec.label != "embedding")
    assert len({spec.name for spec in specs}) == len(specs)
