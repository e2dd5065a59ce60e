"""GGUF files of Llama models as a source: settings, dequantised tensors, tokenizer.

Rows of queries and keys lie there in the order of rotations that pair neighbours; they are put back
into halves, as transformers and we have them. Reading needs the package `gguf`.

Source:  the GGUF specification of ggml.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatewise.parallel.errors import CheckpointError, ConfigError
from gatewise.training.interop.names import RotaryRows
from gatewise.training.interop.source import StoredTensor

__all__ = ["GgufSource", "tokenizer_json"]

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens

# How text is cut before merging, by `tokenizer.ggml.pre`: whether digits stand alone, and a pattern
# (None: GPT-2's own).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, tuple[bool, str | None]] = {
    "default": (False, None),
    "gpt-2": (False, None),
    "smollm": (True, None),
    "llama-bpe": (False, _WORDS % "{1,3}"),
    "qwen2": (False, _WORDS % ""),
}


class GgufSource:
    """A GGUF file of the architecture `llama`, its tensors under transformers' names.

    Args:
        path: of the file.

    Raises:
        CheckpointError: if it cannot be read, or is of another architecture.
        ConfigError: if the package `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self.fields: dict[str, Any] = {  # Any: whatever GGUF holds
            name: field.contents() for name, field in self._reader.fields.items()
        }
        kind = self.fields.get("general.architecture")
        if kind != "llama" or self.fields.get("llama.expert_count"):
            what = "llama with experts" if kind == "llama" else repr(kind)
            raise CheckpointError(
                f"{path} is a model of architecture {what}; this version reads dense llama models"
            )
        self._stored = {}
        unknown = []
        for tensor in self._reader.tensors:
            name = _translate(tensor.name)
            if name is None:
                unknown.append(tensor.name)
            else:
                self._stored[name] = tensor
        if unknown:
            raise CheckpointError(
                f"{path} holds {unknown[0]}"
                + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
                + ", which a llama model of this version has not"
            )
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(tuple(int(n) for n in reversed(tensor.shape)), "F32", path.name)
            for name, tensor in self._stored.items()
        }
        self.config = self._config()

    def read(self, name: str) -> Tensor:
        """Return one tensor, dequantised to fp32."""
        from gguf.quants import dequantize

        stored = self._stored[name]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {stored.name} is of type {stored.tensor_type.name}, which the "
                "package gguf does not dequantise"
            ) from error
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        tensor = tensor.view(self.tensors[name].shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return RotaryRows(0, self._head_width).to_ours(tensor)
        return tensor

    @property
    def _head_width(self) -> int:
        width = self.fields.get("llama.attention.key_length")
        return int(
            width or self._number("embedding_length") // self._number("attention.head_count")
        )

    def _number(self, name: str) -> int:
        try:
            return int(self.fields[f"llama.{name}"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} has no number llama.{name}") from error

    def _config(self) -> dict[str, Any]:
        """Return the settings as transformers' config.json has them."""
        rotated = self.fields.get("llama.rope.dimension_count", self._head_width)
        if rotated != self._head_width:
            raise CheckpointError(
                f"{self.path}: llama.rope.dimension_count is {rotated}, not the width of a head "
                f"({self._head_width}); this version rotates whole heads"
            )
        scaling = self.fields.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise CheckpointError(
                f"{self.path}: llama.rope.scaling.type is {scaling!r}; convert the model's "
                "safetensors with from_hf instead"
            )
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise CheckpointError(f"{self.path} holds no token_embd.weight")
        heads = self._number("attention.head_count")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": embedding.shape[0],
            "hidden_size": self._number("embedding_length"),
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self.fields.get("llama.attention.head_count_kv", heads)),
            "head_dim": self._head_width,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": _float(self.fields.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": float(self.fields.get("llama.rope.freq_base", 10000.0)),
            },
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "bos_token_id": self.fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.fields.get("tokenizer.ggml.eos_token_id"),
            "dtype": "float32",
        }


def tokenizer_json(source: GgufSource) -> str:
    """Return the file's tokenizer in the format of the `tokenizers` library.

    Raises:
        ConfigError: if it is of a kind that is not byte-level BPE, or cuts text in an unknown way.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    fields = source.fields
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or cut not in _CUTS:
        raise ConfigError(
            f"{source.path} has a tokenizer of kind {kind!r} that cuts text as {cut!r}; this "
            f"version knows 'gpt2' with {', '.join(_CUTS)}: give tokenizer=PATH"
        )
    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", ())]
    digits_alone, pattern = _CUTS[cut]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    control, own = (
        [
            tokenizers.AddedToken(token, special=number == _CONTROL, normalized=False)
            for token, number in zip(tokens, types, strict=True)
            if number == wanted
        ]
        for wanted in (_CONTROL, _USER_DEFINED)
    )
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(own)
    return str(tokenizer.to_str(pretty=False))


def _open(path: Path) -> Any:  # GGUFReader, where the package is installed
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"source is {path}, which needs the package gguf; install it with: pip install "
            "'gatewise[gguf]'"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"source is {path}, which is no file; give one that ends in .gguf")
    try:
        reader = gguf.GGUFReader(path)
        reader.fields["general.architecture"].contents()
    except AttributeError as error:
        raise ConfigError(
            "the package gguf is too old; install a newer one with: pip install -U 'gguf>=0.13'"
        ) from error
    except (ValueError, KeyError, IndexError, OSError, TypeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no GGUF file that can be read: {text}") from error
    return reader


def _translate(name: str) -> str | None:
    """Return transformers' name of a tensor; None where a llama model has none."""
    if name in _OUTER:
        return _OUTER[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _INNER or match[3] != "weight":
        return None
    return f"model.layers.{match[1]}.{_INNER[match[2]]}.weight"


def _float(stored: Any) -> float:
    """Return a 32-bit number as the shortest decimal that it stands for (1e-05, not 9.99e-06)."""
    return float(json.loads(str(np.float32(stored))))
