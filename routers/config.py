"""Settings of a router: a scorer, a score function, a selector, a weighting and losses.

Read `api.py` for what a router returns, `router.py` for how the parts come together, `presets.py`
for published combinations. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from enum import Enum

from gatewise.routers.ahead.config import AheadConfig, AheadKind

__all__ = [
    "BalanceScope",
    "BiasRule",
    "Cell",
    "Recurrence",
    "RouterConfig",
    "RouterStart",
    "ScoreFunction",
    "Scorer",
    "Selector",
]


class Scorer(Enum):
    """What makes a token's logits."""

    linear = "linear"
    cosine = "cosine"  # angles between a projection of the token and the experts' vectors
    mlp = "mlp"  # two matrices with GELU between them
    recurrent = "recurrent"  # RMoE: a GRU over the layers
    sparsity = "sparsity"  # MoE-X: how few of the expert's units the token would activate
    hash = "hash"  # no logits: experts alike, for hash layers


class ScoreFunction(Enum):
    """How logits become scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    sqrt_softplus = "sqrt_softplus"
    relu = "relu"


class Selector(Enum):
    """Which experts a token gets; the last four let tokens compete with each other."""

    topk = "topk"
    top_p = "top_p"  # the fewest best experts whose scores sum to router.top_p
    threshold = "threshold"  # every expert with a score above 0
    hash = "hash"  # by token id
    expert_choice = "expert_choice"  # each expert takes its best tokens
    sinkhorn = "sinkhorn"  # top-k of scores balanced by Sinkhorn's iteration
    base = "base"  # one expert per token, the best assignment with equal loads
    soft = "soft"  # every expert gets mixtures of all tokens


class BiasRule(Enum):
    """What moves the balancing bias after each optimizer step."""

    sign = "sign"  # a step of router.bias_rate towards experts with less than mean demand
    quantile = "quantile"  # to the value that would have balanced this step


class BalanceScope(Enum):
    """Over which tokens the load of the balance loss is counted."""

    micro_batch = "micro_batch"
    sequence = "sequence"
    global_batch = "global_batch"


class Cell(Enum):
    """The recurrent scorer's cell."""

    gru = "gru"
    rnn = "rnn"
    lstm = "lstm"


class Recurrence(Enum):
    """What the recurrent scorer hands from layer to layer."""

    full = "full"
    detach = "detach"  # the state without its gradient
    none = "none"  # nothing: the same parameters and arithmetic without the recurrence


class RouterStart(Enum):
    """How the recurrent scorer's parameters start."""

    matched = "matched"  # logits as large as a linear router's
    release = "release"  # everything normal with 0.02, biases too


# Selectors whose choice for a token depends on other tokens, also later ones.
_COMPETING = (Selector.expert_choice, Selector.sinkhorn, Selector.base, Selector.soft)


@dataclass(kw_only=True, slots=True)
class RouterConfig:
    """Settings of a router; defaults are Mixtral's with a global-batch balance loss.

    Routers raise `ValueError` here for what they can know alone; the number of experts and top_k
    belong to the layer and are checked in `check`.
    """

    kind: str = "topk"
    scorer: Scorer = Scorer.linear
    score: ScoreFunction = ScoreFunction.softmax
    selector: Selector = Selector.topk
    renormalise: bool = True  # divide the chosen scores by their sum (DeepSeek-V3, Mixtral)
    scale: float = 1.0  # multiplies the combine weights after renormalisation
    logit_bias: bool = False  # scorer linear: the logits have a learned bias (gpt-oss)
    num_groups: int = 1  # group-limited selection: experts are cut into this many groups
    top_groups: int = 1  # ... of which each token may use this many
    top_p: float = 0.4  # selector top_p: mass of scores that a token's experts reach
    choice_factor: float = 2.0  # selector expert_choice: tokens per expert, times E / tokens
    slots: int = 1  # selector soft: mixtures per expert
    hash_layers: int = 0  # the first MoE layers choose by token id (DeepSeek-V4)
    hash_table: str | None = None  # a .npy file of expert ids, vocabulary x top_k; null: random
    allow_noncausal: bool = False  # let tokens of a causal model compete with later ones
    bias_rule: BiasRule = BiasRule.sign
    bias_rate: float = 0.0  # step of the balancing bias (quantile: share of the new); 0 is off
    balance_loss: float = 0.01  # weight of the balance loss; 0 is off
    balance_scope: BalanceScope = BalanceScope.global_batch
    first_choice_loss: bool = False  # the balance loss counts first choices only (GShard)
    sparsity_rate: float = 0.0  # ReMoE: factor that steers balance_loss to top_k experts; 0 is off
    z_loss: float = 0.001  # weight of mean(logsumexp(logits)^2); 0 is off
    importance_loss: float = 0.0  # weight of CV(sums of weights)^2 (Shazeer); 0 is off
    load_loss: float = 0.0  # weight of CV(smooth load)^2 (Shazeer); 0 is off
    batch_entropy_loss: float = 0.0  # weight of minus the entropy of mean scores (sigma-MoE)
    token_entropy_loss: float = 0.0  # weight of the mean entropy of a token's scores (top-p)
    jitter: float = 0.0  # multiply the router's input by U(1-jitter, 1+jitter) in training
    learned_noise: bool = False  # add noise of learned size to the logits in training (Shazeer)
    expert_dropout: float = 0.0  # share of experts hidden from each token in training (sigma-MoE)
    random_second: bool = False  # use the second expert with probability 2 w, in training (GShard)
    cosine_dim: int | None = None  # scorer cosine: width of the projection; null: E / 2
    cosine_bias: bool = False  # scorer cosine: the projection has a bias
    temperature: float = 0.5  # scorer cosine: where the learned temperature starts
    mlp_width: int = 256  # scorer mlp: inner width
    state_dim: int = 128  # scorer recurrent: width p of the state
    cell: Cell = Cell.gru
    recurrence: Recurrence = Recurrence.full
    shared_projection: bool = False  # scorer recurrent: the cell reads the token itself
    residual_scores: float = 0.0  # scorer recurrent: share of the previous layer's logits added
    start: RouterStart = RouterStart.matched
    ahead: AheadConfig = field(default_factory=AheadConfig)

    def __post_init__(self) -> None:
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"router.{name} is {value}; it must be at least 0")
        for name in ("jitter", "expert_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"router.{name} is {value}; it must be in [0, 1)")
        for name in ("scale", "choice_factor", "temperature"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"router.{name} is {value}; it must be above 0")
        for name in ("slots", "mlp_width", "state_dim", "cosine_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"router.{name} is {value}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"router.top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"router.top_groups is {self.top_groups}; it must be from 1 to "
                f"router.num_groups ({self.num_groups})"
            )
        self._check_parts()
        if self.ahead.is_on:
            self._check_ahead()

    def _check_ahead(self) -> None:
        """Refuse parts that choose experts where a pre-gate does."""
        kind = self.ahead.kind.name
        for name, plain in (
            ("selector", Selector.topk),
            ("num_groups", 1),
            ("hash_layers", 0),
            ("bias_rate", 0.0),
            ("expert_dropout", 0.0),
            ("random_second", False),
        ):
            value = getattr(self, name)
            if value != plain:
                shown, wanted = (v.name if isinstance(v, Enum) else v for v in (value, plain))
                raise ValueError(
                    f"router.{name} is {shown}, but with router.ahead.kind={kind} the layers do "
                    f"not choose; set router.{name}={wanted} or router.ahead.kind=off"
                )
        if self.scorer is Scorer.hash and self.ahead.learns:
            raise ValueError(
                "router.scorer is hash, which has no logits that a pre-gate could learn from; use "
                "scorer=linear or router.ahead.kind=hash"
            )
        if self.scorer is not Scorer.linear and self.ahead.weighs:
            raise ValueError(
                f"router.scorer is {self.scorer.name}, but with router.ahead.weights=pregate the "
                "layers have no scorer; use scorer=linear or router.ahead.weights=layer"
            )

    def _check_parts(self) -> None:
        """Refuse parts that do not go together."""
        scopes_local = self.balance_scope is not BalanceScope.global_batch
        local = self.importance_loss or self.load_loss or self.batch_entropy_loss
        for wrong, message in (
            (
                self.selector is Selector.threshold and self.score is not ScoreFunction.relu,
                f"router.selector is threshold but router.score is {self.score.name}, which is "
                "above 0 everywhere; use score=relu",
            ),
            (
                self.selector is Selector.top_p and self.score is not ScoreFunction.softmax,
                f"router.selector is top_p but router.score is {self.score.name}, whose scores "
                "do not sum to 1; use score=softmax",
            ),
            (
                self.num_groups > 1 and self.selector is not Selector.topk,
                f"router.num_groups is {self.num_groups} but router.selector is "
                f"{self.selector.name}; only topk knows groups",
            ),
            (
                self.bias_rate > 0 and self.selector is not Selector.topk,
                f"router.bias_rate is {self.bias_rate} but router.selector is "
                f"{self.selector.name}; a bias balances topk only",
            ),
            (
                self.bias_rule is BiasRule.quantile and self.num_groups > 1,
                f"router.bias_rule is quantile but router.num_groups is {self.num_groups}; "
                "quantiles know no groups, use 1 or bias_rule=sign",
            ),
            (
                self.bias_rule is BiasRule.quantile and self.bias_rate > 1,
                f"router.bias_rate is {self.bias_rate}; with bias_rule=quantile it is the share "
                "of the new bias, at most 1",
            ),
            (
                self.sparsity_rate != 0 and self.sparsity_rate <= 1,
                f"router.sparsity_rate is {self.sparsity_rate}; it is a factor above 1, or 0 for "
                "off",
            ),
            (
                self.sparsity_rate > 0 and not self.balance_loss > 0,
                f"router.balance_loss is {self.balance_loss}; with router.sparsity_rate it is "
                "where the steered weight starts and must be above 0",
            ),
            (
                bool(local) and not scopes_local,
                "router.importance_loss, load_loss and batch_entropy_loss look at one rank's "
                "tokens; set router.balance_scope to micro_batch or sequence",
            ),
            (
                self.first_choice_loss and not scopes_local,
                "router.first_choice_loss is on but router.balance_scope is global_batch, which "
                "counts all choices; use micro_batch or sequence",
            ),
            (
                self.load_loss > 0 and not self.learned_noise,
                f"router.load_loss is {self.load_loss} but router.learned_noise is off; the "
                "smooth load is defined by that noise",
            ),
            (
                self.learned_noise and self.scorer is not Scorer.linear,
                f"router.learned_noise is on but router.scorer is {self.scorer.name}; it belongs "
                "to scorer=linear",
            ),
            (
                self.logit_bias
                and (self.scorer is not Scorer.linear or self.selector is Selector.soft),
                "router.logit_bias is true, which belongs to scorer=linear without soft slots",
            ),
            (
                self.scorer is Scorer.hash and self.selector is not Selector.hash,
                f"router.scorer is hash but router.selector is {self.selector.name}; without "
                "logits only selector=hash can choose",
            ),
            (
                self.selector is Selector.soft and self.scorer is not Scorer.linear,
                f"router.selector is soft but router.scorer is {self.scorer.name}; its slots "
                "have one matrix, use scorer=linear",
            ),
        ):
            if wrong:
                raise ValueError(message)

    @property
    def competing(self) -> bool:
        """Whether a token's experts depend on other tokens of its sequence."""
        return self.selector in _COMPETING

    @property
    def uses_hash(self) -> bool:
        """Whether some layer chooses by token id."""
        ahead = self.ahead.kind is AheadKind.hash
        return self.selector is Selector.hash or self.hash_layers > 0 or ahead

    def check(self, num_experts: int, top_k: int, *, causal: bool = False) -> None:
        """Raise `ValueError` where these settings do not fit the model.

        Args:
            num_experts: E.
            top_k: K.
            causal: whether the model predicts tokens from earlier ones.
        """
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"model.top_k is {top_k}; it must be from 1 to model.num_experts ({num_experts})"
            )
        if num_experts % self.num_groups:
            raise ValueError(
                f"router.num_groups is {self.num_groups}, which does not divide "
                f"model.num_experts ({num_experts}); choose a divisor"
            )
        reachable = num_experts // self.num_groups * self.top_groups
        if top_k > reachable:
            raise ValueError(
                f"model.top_k is {top_k} but router.top_groups={self.top_groups} leaves only "
                f"{reachable} experts to choose from; raise router.top_groups"
            )
        if causal and self.competing and not self.allow_noncausal:
            raise ValueError(
                f"router.selector is {self.selector.name}, which chooses by looking at later "
                "tokens too; a causal model would learn from them: use another selector, or set "
                "router.allow_noncausal=true if you know that"
            )
        if self.selector is Selector.base and top_k != 1:
            raise ValueError(f"model.top_k is {top_k}; router.selector=base gives one expert: 1")
        if self.random_second and top_k != 2:
            raise ValueError(f"model.top_k is {top_k}; router.random_second needs exactly 2")
        if self.learned_noise and self.load_loss and top_k == num_experts:
            raise ValueError(
                f"model.top_k is {top_k}, all experts; router.load_loss needs one left out"
            )


_NOT_NEGATIVE = (
    "hash_layers",
    "bias_rate",
    "balance_loss",
    "sparsity_rate",
    "z_loss",
    "importance_loss",
    "load_loss",
    "batch_entropy_loss",
    "token_entropy_loss",
    "residual_scores",
)
