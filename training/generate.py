"""Text from a model, token by token, with a key-value cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewise.moe.attention import KeyValueCache
from gatewise.moe.model import Decoder
from gatewise.parallel.errors import ConfigError
from gatewise.training.tokenizer import StreamDecoder, TextTokenizer

__all__ = ["Sampling", "stream_text"]


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


@torch.no_grad()
def stream_text(
    model: Decoder, tokenizer: TextTokenizer, prompt: str, sampling: Sampling
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces of complete characters.

    Ends after `sampling.tokens` tokens or at the end-of-text token. The same seed gives the same
    text.

    Args:
        model: all its experts on this rank; put into evaluation mode.
        tokenizer: of the model.
        prompt: may be empty: generation then starts from end-of-text.
        sampling: how tokens are drawn.
    """
    model.eval()
    device = model.embedding.device
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    cache, decoder = KeyValueCache(), StreamDecoder(tokenizer)
    token_1S = torch.tensor([ids], device=device)
    for _ in range(sampling.tokens):
        hidden_D = model(token_1S, cache=cache).hidden_BSD[0, -1]
        token = _draw(model.logits(hidden_D), sampling, generator)
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
