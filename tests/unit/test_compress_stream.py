"""A model run one block at a time gives what it gives at once, whatever its router."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from training_runs import tiny

from gatewise.compression.gradients import measure_gradients, read_gradients
from gatewise.compression.load import build_empty
from gatewise.compression.observe import attention_hessians, gram, see_feed_forward
from gatewise.compression.plan import list_parts
from gatewise.compression.stream import BlockStream
from gatewise.moe.layer import MoELayer
from gatewise.moe.model import Block, Decoder, initialise
from gatewise.routers.presets import preset
from gatewise.training.checkpoint_format import FlatRange
from gatewise.training.config import TrainConfig
from gatewise.training.state import model_ranges

CPU = torch.device("cpu")
ROUTERS = ["mixtral", "deepseek_v3", "rmoe", "remoe", "top_p", "hash", "moe_x", "gru_pregate"]
VOCAB = 40


def build(config: TrainConfig) -> tuple[Decoder, BlockStream]:
    """Return a whole model, and a stream that reads its weights."""
    whole = build_empty(config, VOCAB)
    whole.to_empty(device=CPU)
    initialise(whole, 0)
    source = model_ranges(whole)

    def fill(ranges: Mapping[str, FlatRange]) -> None:
        for name, part in ranges.items():
            part.data.copy_(source[name].data)

    return whole.eval(), BlockStream(build_empty(config, VOCAB), fill, CPU)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (3, 20), generator=generator) for _ in range(2)]


@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_blocks_one_by_one_give_what_the_model_gives(router: str) -> None:
    config = tiny(router=preset(router), model={"layers": 3, "shared_experts": 1})
    whole, stream = build(config)
    stream.begin(batches())
    assert stream.model.blocks[0].norm_attention.gain.is_meta  # type: ignore[union-attr]
    for layer in range(3):
        with stream.resident(layer) as block:
            stream.advance(block)
        assert all(parameter.is_meta for parameter in block.parameters())
    with stream.resident(2) as block:
        pass
    found = [arguments[0] for arguments in stream._arguments]
    for token_BS, x_BSD in zip(batches(), found, strict=True):
        want_BSD = whole(token_BS).hidden_BSD
        assert torch.equal(whole.norm_final(x_BSD), want_BSD)


@torch.no_grad()
def test_hessians_are_those_of_the_inputs() -> None:
    whole, stream = build(tiny(model={"layers": 2, "dense_layers": 1}))
    stream.begin(batches())
    x_BSD = torch.cat([torch.nn.functional.embedding(t, whole.embedding) for t in batches()])
    first = whole.blocks[0]
    assert isinstance(first, Block)
    with stream.resident(0) as block:
        hessians = attention_hessians(stream, block)
        seen = see_feed_forward(stream, block)
        stream.advance(block)
    normed_TD = first.norm_attention(x_BSD).flatten(0, 1)
    want_DD = normed_TD.double().T @ normed_TD.double()
    torch.testing.assert_close(hessians["w_qkv"], want_DD, rtol=1e-5, atol=1e-4)
    assert hessians["w_out"].shape == (16, 16)
    assert float(hessians["w_out"].trace()) > 0
    assert seen.expert_TK is None
    assert seen.batch_ends == (60, 120)
    want_DD = seen.x_TD.double().T @ seen.x_TD.double()
    torch.testing.assert_close(gram(seen.x_TD), want_DD, rtol=1e-5, atol=1e-4)
    with stream.resident(1) as block:
        seen = see_feed_forward(stream, block)
    assert seen.expert_TK is not None
    assert seen.expert_TK.shape == (120, 2)


def test_gradients_are_those_of_the_loss(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    whole, _ = build(tiny(model={"layers": 2}))
    whole.double()
    tokens = batches()
    measure_gradients(whole, tokens, tmp_path)
    found_TD = read_gradients(tmp_path, 2, 1)
    assert all(parameter.requires_grad for parameter in whole.parameters())

    def loss(shift: float, batch: int, row: int, channel: int) -> float:
        def move(_module: object, _inputs: object, output: tuple[Tensor, object, object]) -> object:
            moved_TD = output[0].clone()
            moved_TD[row, channel] += shift
            return (moved_TD, *output[1:])

        layer = whole.moe_layers()[1]
        assert isinstance(layer, MoELayer)
        hook = layer.register_forward_hook(move)
        try:
            with torch.no_grad():
                token_BS = tokens[batch]
                logits = whole(token_BS[:, :-1]).hidden_BSD @ whole.output_weight.T
                target = token_BS[:, 1:].flatten()
                nats = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), target, reduction="sum"
                )
                return float(nats)
        finally:
            hook.remove()

    for batch, row, channel in ((0, 5, 3), (1, 50, 7)):
        slope = (loss(1e-5, batch, row, channel) - loss(-1e-5, batch, row, channel)) / 2e-5
        assert float(found_TD[batch * 57 + row, channel]) == pytest.approx(slope, rel=0.01)


def test_every_parameter_is_planned_or_kept_once() -> None:
    from compressed_models import settings

    model = build_empty(tiny(model={"layers": 3, "dense_layers": 1, "shared_experts": 1}), VOCAB)
    plan = list_parts(model, settings())
    sizes = {name: part.numel for name, part in model_ranges(model).items()}
    counted: dict[str, int] = {}
    for part in plan.parts:
        name = f"model/{part.source}"
        counted[name] = counted.get(name, 0) + part.shape.elements
    for item in plan.kept:
        assert item.name not in counted
        counted[item.name] = int(torch.Size(item.shape).numel())
    assert counted == sizes
    assert {part.kind for part in plan.parts} == {"expert", "shared", "dense", "attention"}
    assert not any("router" in part.source for part in plan.parts)
