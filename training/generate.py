"""Text from a model, token by token, with a key-value cache."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.moe.attention import KeyValueCache
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import ConfigError
from gatewise.training.tokenizer import StreamDecoder, TextTokenizer

__all__ = ["Sampling", "Tally", "stream_text"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn."""

    tokens: int = 200  # at most
    temperature: float = 0.8  # 0 takes the most likely token
    top_k: int = 50  # draw among so many; 0: all
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens is {self.tokens}; it must be at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be at least 0")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 0 (0: no limit)")


@dataclass(slots=True)
class Tally:
    """What a generation took; filled while it runs."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0  # until the first token was drawn
    tokens: int = 0  # drawn one by one after the first
    seconds: float = 0.0  # for them

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second once the prompt was read; None for a single token."""
        return self.tokens / self.seconds if self.tokens else None


@torch.no_grad()
def stream_text(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompt: str,
    sampling: Sampling,
    tally: Tally | None = None,
    *,
    agree: Callable[[int], int] = lambda token: token,
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces of complete characters.

    Ends after `sampling.tokens` tokens or at the end-of-text token. The same seed gives the same
    text.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model.
        prompt: may be empty: generation then starts from end-of-text.
        sampling: how tokens are drawn.
        tally: counts tokens and the time of the model, without that of the caller.
        agree: takes the token that was drawn and returns the one that is used. Where experts are
            spread over ranks all must use the same: a rank that ended its text alone would leave
            the others waiting.
    """
    tally = tally or Tally()
    model.eval()
    device = model.embedding.device
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    cache, decoder = KeyValueCache(), StreamDecoder(tokenizer)
    token_1S = torch.tensor([ids], device=device)
    tally.prompt_tokens = len(ids)
    for number in range(sampling.tokens):
        began = time.perf_counter()
        hidden_D = model(token_1S, cache=cache).hidden_BSD[0, -1]
        token = agree(_draw(model.logits(hidden_D), sampling, generator))
        if number == 0:
            tally.prompt_seconds = time.perf_counter() - began
        else:
            tally.tokens += 1
            tally.seconds += time.perf_counter() - began
        if token == tokenizer.end_of_text:
            break
        piece = decoder.push(token)
        if piece:
            yield piece
        token_1S = torch.tensor([[token]], device=device)
    rest = decoder.finish()
    if rest:
        yield rest


def _draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    logits_V = logits_V.float().cpu()  # the host needs the token anyway
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    if sampling.top_k and sampling.top_k < logits_V.shape[0]:
        threshold = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, float("-inf"))
    probability_V = (logits_V / sampling.temperature).softmax(-1)
    return int(torch.multinomial(probability_V, 1, generator=generator))
