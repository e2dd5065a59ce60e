"""Generation: the cache changes nothing, the seed decides, and texts are whole characters."""

from collections.abc import Iterable

import pytest
import torch
from small_models import small_model

from gatewise.moe.attention import KeyValueCache
from gatewise.moe.config import ModelConfig
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import ConfigError
from gatewise.routers.config import RouterConfig
from gatewise.training.generate import Sampling, Tally, stream_text
from gatewise.training.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def build() -> Decoder:
    return small_model(
        ModelConfig(layers=2, hidden=16, heads=2, num_experts=4, expert_width=8, init_std=0.5),
        RouterConfig(jitter=0.1),
        vocab_size=BYTES.vocab_size,
        seed=3,
    )


def text(prompt: str = "def ", **settings: object) -> str:
    return "".join(stream_text(build(), BYTES, prompt, Sampling(**settings)))  # type: ignore[arg-type]


class Scripted(torch.nn.Module):
    """A model whose most likely next tokens are given."""

    def __init__(self, ids: Iterable[int]) -> None:
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.zeros(257, 1))
        self.ids = iter(ids)
        self.prompts: list[list[int]] = []

    def forward(self, token_1S: torch.Tensor, cache: object) -> object:
        self.prompts.append(token_1S[0].tolist())
        logits = torch.zeros(1, 1, 257)
        logits[..., next(self.ids)] = 9.0
        return type("Output", (), {"hidden_BSD": logits})

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def scripted(ids: Iterable[int], prompt: str = "x", tokens: int = 50) -> tuple[list[str], Scripted]:
    model = Scripted(ids)
    pieces = stream_text(model, BYTES, prompt, Sampling(tokens=tokens, temperature=0))  # type: ignore[arg-type]
    return list(pieces), model


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    first = text(tokens=40, seed=1)
    torch.manual_seed(99)  # nothing else has a say
    assert text(tokens=40, seed=1) == first
    assert text(tokens=40, seed=2) != first


def test_greedy_text_is_the_most_likely_token_of_the_whole_sequence_each_time() -> None:
    model = build().eval()
    ids = BYTES.encode("for x in")
    start = len(ids)
    with torch.no_grad():
        for _ in range(20):
            logits = model.logits(model(torch.tensor([ids])).hidden_BSD[0, -1])
            ids.append(int(logits.argmax()))
            if ids[-1] == BYTES.end_of_text:
                break
    assert text("for x in", tokens=20, temperature=0.0) == BYTES.decode(ids[start:])


def test_an_empty_prompt_starts_from_the_end_of_a_text() -> None:
    _, model = scripted([104, 105, 256], prompt="")
    assert model.prompts == [[256], [104], [105]]
    assert isinstance(text("", tokens=5), str)


def test_generation_ends_at_the_end_of_the_text_or_after_so_many_tokens() -> None:
    pieces, _ = scripted([104, 105, 256, 106])
    assert pieces == ["h", "i"]
    pieces, model = scripted([104] * 10, tokens=3)
    assert pieces == ["h"] * 3
    assert len(model.prompts) == 3


def test_pieces_are_whole_characters() -> None:
    pieces, _ = scripted([*"\u00e9\u4e2d".encode(), 0xC3, 256])
    assert pieces == ["\u00e9", "\u4e2d", "\ufffd"]  # the last one was cut off


def test_only_the_best_tokens_are_drawn() -> None:
    from gatewise.training.generate import _draw

    logits_V = torch.arange(10.0)
    generator = torch.Generator().manual_seed(0)
    drawn = {_draw(logits_V, Sampling(top_k=3, temperature=50.0), generator) for _ in range(200)}
    assert drawn == {7, 8, 9}
    drawn = {_draw(logits_V, Sampling(top_k=0, temperature=1e6), generator) for _ in range(300)}
    assert drawn == set(range(10))
    assert _draw(logits_V, Sampling(temperature=0.0), generator) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_routers_are_asked_for_choices_alone() -> None:
    model = build().eval()
    token_1S = torch.tensor([BYTES.encode("def f(x):")])
    for alone, full in zip(
        model(token_1S, cache=KeyValueCache()).routings, model(token_1S).routings, strict=True
    ):
        assert torch.equal(alone.expert_TK, full.expert_TK)
        assert torch.equal(alone.weight_TK, full.weight_TK)
        assert full.losses
        assert (alone.losses, alone.load, alone.health) == ({}, None, {})


def test_the_tally_counts_what_was_drawn() -> None:
    tally = Tally()
    pieces = list(stream_text(build(), BYTES, "def ", Sampling(tokens=7), tally))
    assert pieces
    assert (tally.prompt_tokens, tally.tokens) == (4, 6)
    assert tally.tokens_per_second == pytest.approx(6 / tally.seconds)
    one = Tally()
    list(stream_text(build(), BYTES, "", Sampling(tokens=1), one))
    assert (one.prompt_tokens, one.tokens, one.tokens_per_second) == (1, 0, None)


def test_the_token_that_the_ranks_agree_on_is_used() -> None:
    drawn: list[int] = []

    def agree(token: int) -> int:
        drawn.append(token)
        return ord("b")

    model = Scripted([ord("a")] * 3)
    pieces = stream_text(model, BYTES, "x", Sampling(tokens=3, temperature=0), agree=agree)  # type: ignore[arg-type]
    assert "".join(pieces) == "bbb"
    assert drawn == [ord("a")] * 3
    assert model.prompts[1:] == [[ord("b")]] * 2
