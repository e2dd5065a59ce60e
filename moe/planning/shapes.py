"""Shapes of published MoE models, with the arithmetic of their sizes.

A shape has what time and memory depend on and nothing else. `conf/model_shape/` holds the models;
the tests compare the arithmetic with the totals that their authors publish.
"""

from dataclasses import dataclass, fields

__all__ = ["ModelShape"]


@dataclass(kw_only=True, slots=True)
class ModelShape:
    """A decoder whose layers are attention and a dense or a Mixture-of-Experts network.

    With `kv_rank` above 0 attention is multi-head latent attention (arXiv:2405.04434); else
    grouped-query attention with heads of `head_dim`.
    """

    name: str
    source: str  # where the numbers come from
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys; with latent attention the part without positions
    experts: int  # per layer, without the shared ones
    top_k: int
    expert_width: int
    shared_experts: int = 0  # every token passes these, each of `expert_width`
    dense_layers: int = 0  # first layers without experts
    dense_width: int = 0  # inner width of these
    matrices: int = 3  # of an expert: 3 with a gate, else 2
    tied_embeddings: bool = False  # one matrix for input and output tokens
    query_rank: int = 0  # latent attention: rank of the queries
    kv_rank: int = 0  # latent attention: rank of keys and values
    rope_dim: int = 0  # latent attention: part of queries and keys with positions
    value_dim: int = 0  # latent attention: of a head's values

    def __post_init__(self) -> None:
        optional = ("shared_experts", "dense_layers", "dense_width")
        latent = ("query_rank", "kv_rank", "rope_dim", "value_dim")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (str, bool)):
                continue
            least = 0 if item.name in (*optional, *latent) else 1
            if value < least:
                raise ValueError(f"model.{item.name} is {value}; it must be at least {least}")
        if self.top_k > self.experts:
            raise ValueError(
                f"model.top_k is {self.top_k}, more than model.experts ({self.experts})"
            )
        if self.dense_layers > self.layers:
            raise ValueError(
                f"model.dense_layers is {self.dense_layers}, more than model.layers ({self.layers})"
            )
        if self.dense_layers and not self.dense_width:
            raise ValueError("model.dense_width is 0; model.dense_layers needs it above 0")
        if self.kv_rank and not (self.rope_dim and self.value_dim):
            raise ValueError("model.kv_rank needs model.rope_dim and model.value_dim above 0")

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts."""
        return self.layers - self.dense_layers

    @property
    def query_dim(self) -> int:
        """Width of a head's queries."""
        return self.head_dim + self.rope_dim

    @property
    def head_value_dim(self) -> int:
        """Width of a head's values."""
        return self.value_dim or self.head_dim

    def attention_parameters(self) -> int:
        """Return the weights of one attention layer."""
        if not self.kv_rank:
            return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        queries = self.heads * self.query_dim
        if self.query_rank:
            query_weights = self.query_rank * (self.hidden + queries)
        else:
            query_weights = self.hidden * queries
        keys = self.hidden * (self.kv_rank + self.rope_dim)
        keys += self.kv_rank * self.heads * (self.head_dim + self.value_dim)
        return query_weights + keys + self.heads * self.value_dim * self.hidden

    def expert_parameters(self) -> int:
        """Return the weights of one expert."""
        return self.matrices * self.hidden * self.expert_width

    def shared_parameters(self) -> int:
        """Return the weights of a layer's shared experts."""
        return self.shared_experts * self.expert_parameters()

    def router_parameters(self) -> int:
        """Return the weights of a layer's router."""
        return self.hidden * self.experts

    def dense_parameters(self) -> int:
        """Return the weights of the network of a layer without experts."""
        return self.matrices * self.hidden * self.dense_width

    def embedding_parameters(self) -> int:
        """Return the weights that turn tokens into vectors and vectors into logits."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)

    def total_parameters(self) -> int:
        """Return all weights."""
        return self._parameters(self.experts)

    def active_parameters(self) -> int:
        """Return the weights that one token meets."""
        return self._parameters(self.top_k)

    def _parameters(self, experts: int) -> int:
        norms = 2 * self.hidden
        moe = self.router_parameters() + self.shared_parameters()
        moe += experts * self.expert_parameters()
        return (
            self.embedding_parameters()
            + self.layers * (self.attention_parameters() + norms)
            + self.moe_layers * moe
            + self.dense_layers * self.dense_parameters()
            + self.hidden
        )
