"""Settings of `gatewise compress`: how wide, by which costs, which quantiser, on which text."""

import math
from dataclasses import dataclass, field
from enum import Enum

from gatewise.compression.formats import WIDTHS, ZeroPoint, parse_widths
from gatewise.parallel.errors import ConfigError
from gatewise.training.config import RunConfig

__all__ = [
    "Allocation",
    "Budget",
    "CalibrationConfig",
    "CompressConfig",
    "Fisher",
    "Granularity",
    "GridConfig",
    "Kept",
    "Method",
    "Perturbation",
    "PmqConfig",
    "Protect",
    "PruneConfig",
    "PruneRule",
    "Repair",
    "RepairConfig",
    "TextConfig",
    "Weights",
]


class Allocation(Enum):
    """Which experts get the bits."""

    fisher_global = "fisher_global"  # output error weighted by gradients, one budget
    fisher_block = "fisher_block"  # the same, every block the same budget
    fnorm2_global = "fnorm2_global"  # squared output error, one budget
    fnorm2 = "fnorm2"  # the same, every block the same budget
    pmq_paper = "pmq_paper"  # MC-MoE's costs as its paper states them, its width rules
    pmq_release = "pmq_release"  # as its published plans were made
    hessian = "hessian"  # trace of the Hessian times the squared weight error, PMQ's rules
    frequency = "frequency"  # the widths of pmq_release, the widest to the most used
    weight = "weight"  # the widths of pmq_release, the widest to the largest gates
    random = "random"  # the widths of pmq_release, dealt at random
    uniform = "uniform"  # the widest single width that fits


class Fisher(Enum):
    """What the gradient of the loss is multiplied with, in `fisher_*` costs."""

    token = "token"  # a token's whole change, then squared
    diagonal = "diagonal"  # each channel's change, squared one by one


class Budget(Enum):
    """What `bits` counts."""

    paper = "paper"  # codes over all quantised weights: experts, attention, dense layers
    experts = "experts"  # codes over the routed experts
    metadata = "metadata"  # codes, scales and zeros over all quantised weights


class Granularity(Enum):
    """What gets one width."""

    expert = "expert"
    projection = "projection"  # an expert's first and second matrix apart
    layer = "layer"  # all experts of a layer alike, as export formats need it


class Method(Enum):
    """How weights become codes."""

    gptq = "gptq"
    rtn = "rtn"  # round to nearest on the same searched grid


class Perturbation(Enum):
    """Which quantiser the costs are measured with."""

    method = "method"  # the one that is used
    rtn = "rtn"  # round to nearest, which is quicker


class Kept(Enum):
    """How the embedding and the output weights are stored."""

    bf16 = "bf16"
    fp32 = "fp32"


class Weights(Enum):
    """How the quantised weights of a compressed model are held while it runs."""

    packed = "packed"  # as codes, which kernels read
    dequantised = "dequantised"  # as numbers, as those of any model


@dataclass(kw_only=True, slots=True)
class GridConfig:
    """How the grid of a group of weights is found."""

    group: int = 128  # weights of a row that share scale and zero
    zero: ZeroPoint = ZeroPoint.float
    clip_low: float = 0.3  # least share of a group's range that is tried
    clip_high: float = 1.05  # largest share
    clip_steps: int = 26  # shares that are tried; 1: the whole range only
    refine: int = 2  # least-squares steps on scale and zero after that

    def __post_init__(self) -> None:
        if self.group < 8 or self.group % 8:
            raise ConfigError(f"grid.group is {self.group}; it must be a multiple of 8")
        if not 0 < self.clip_low <= self.clip_high:
            raise ConfigError(
                f"grid.clip_low is {self.clip_low}; it must be above 0 and at most grid.clip_high "
                f"({self.clip_high})"
            )
        if self.clip_steps < 1:
            raise ConfigError(f"grid.clip_steps is {self.clip_steps}; it must be at least 1")
        if self.refine < 0:
            raise ConfigError(f"grid.refine is {self.refine}; it must be at least 0")


@dataclass(kw_only=True, slots=True)
class CalibrationConfig:
    """The training sequences that statistics come from."""

    sequences: int = 64  # of the run's data.sequence_length
    batch: int = 8  # sequences per pass
    pool: float = 2.0  # so many times the sequences are looked at, to choose those that cover
    seed: int = 0  # of the choice of sequences

    def __post_init__(self) -> None:
        for name in ("sequences", "batch"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"calibration.{name} is {value}; it must be at least 1")
        if not self.pool >= 1:
            raise ConfigError(f"calibration.pool is {self.pool}; it must be at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(
                f"calibration.seed is {self.seed}; it must be from 0 to {(1 << 32) - 1}"
            )


@dataclass(kw_only=True, slots=True)
class PmqConfig:
    """Exponents of cost = frequency^alpha * weight^beta * error^gamma; None: as the preset has."""

    alpha: float | None = None  # of the frequency
    beta: float | None = None  # of the weight
    gamma: float | None = None  # of the error


@dataclass(kw_only=True, slots=True)
class TextConfig:
    """Another text than the run's, and how much of it is evaluated."""

    path: str | None = None  # files as in `train`; None: the run's own text
    evaluate: bool = True  # compare before and after on the validation split
    tokens: int | None = 20000  # targets that are compared, at most; None: the whole split

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"text.tokens is {self.tokens}; it must be at least 1 or null")


class PruneRule(Enum):
    """Which of a token's experts are dropped when the model runs; `pruning.py` has the formulas."""

    none = "none"
    ratio = "ratio"  # weight below mu times the token's largest; mu by layer and rank
    ser = "ser"  # beyond the first `keep_least`, weight at most `threshold` times the largest
    top_p = "top_p"  # behind the fewest that hold `top_p` of the token's weight
    saliency = "saliency"  # weight times the mean norm of the expert's output below a threshold
    budget = "budget"  # ratio with a mu per layer, by the least error at `keep` of all activations


class Protect(Enum):
    """Which tokens keep all their experts."""

    none = "none"
    l1 = "l1"  # the largest L1 norms of the layer's input
    col = "col"  # the same times the mean attention that the token receives


class Repair(Enum):
    """How routers are fitted to the quantised weights."""

    none = "none"
    topk_mse = "topk_mse"  # layer by layer, to the chosen logits of the uncompressed model
    cross_entropy = "cross_entropy"  # at the end, by the loss on the calibration sequences


@dataclass(kw_only=True, slots=True)
class PruneConfig:
    """Experts that are dropped for a token; thresholds are calibrated on the quantised model."""

    rule: PruneRule = PruneRule.none
    protect: Protect = Protect.none
    share: float = 0.02  # of the tokens of a sequence that are protected
    queries: int = 512  # protect=col: attention of so many last positions counts
    quantile: float = 0.5  # of the calibration tokens: ratio by rank, saliency of all ranks but 1
    mu: float | None = None  # ratio: one threshold for all layers and ranks; null: calibrated
    keep_least: int = 1  # ser: experts of a token that always stay
    threshold: float = 0.4  # ser: of the weight, relative to the largest
    top_p: float = 0.9  # share of a token's weight that is kept
    keep: float = 0.85  # budget: share of all activations that is kept
    preserve_sum: bool = False  # keep the sum of weights where the model does not renormalise

    def __post_init__(self) -> None:
        for name in ("share", "quantile", "threshold"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"prune.{name} is {value}; it must be from 0 to 1")
        for name in ("top_p", "keep"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ConfigError(f"prune.{name} is {value}; it must be above 0 and at most 1")
        for name in ("queries", "keep_least"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"prune.{name} is {value}; it must be at least 1")
        if self.mu is not None and not 0 <= self.mu < math.inf:
            raise ConfigError(
                f"prune.mu is {self.mu}; it must be a finite number, at least 0, or null"
            )


@dataclass(kw_only=True, slots=True)
class RepairConfig:
    """Routers that are fitted to the quantised weights; others stay bit for bit."""

    rule: Repair = Repair.none
    ridge: float = 0.1  # topk_mse: pull to the old weights, times the mean squared input
    rate: float = 1e-4  # cross_entropy: learning rate of AdamW
    epochs: int = 1  # cross_entropy: passes over the calibration sequences

    def __post_init__(self) -> None:
        for name in ("ridge", "rate"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"repair.{name} is {value}; it must be above 0")
        if self.epochs < 1:
            raise ConfigError(f"repair.epochs is {self.epochs}; it must be at least 1")


@dataclass(kw_only=True, slots=True)
class CompressConfig:
    """One compression."""

    checkpoint: str | None = None  # a run's folder, its checkpoints folder or one step
    bits: float = 2.5  # mean width to reach, counted as `budget` says
    budget: Budget = Budget.paper
    bytes: int | None = None  # instead of bits: all tensors of the artefact together
    allocation: Allocation = Allocation.fisher_global
    fisher: Fisher = Fisher.token  # how fisher_* costs weigh a change by the gradient
    granularity: Granularity = Granularity.expert
    widths: str = "1,2,3"  # of experts: some of 1, 1.58, 2, 3, 4, 8
    method: Method = Method.gptq
    perturbation: Perturbation = Perturbation.method
    attention_bits: float = 4.0  # width of attention; 16 keeps it as bf16
    shared_bits: float = 4.0  # of shared experts
    dense_bits: float = 4.0  # of dense feed-forward layers
    kept: Kept = Kept.bf16  # embedding and output weights; routers and norms stay fp32
    damp: float = 0.01  # of GPTQ, times the mean of the Hessian's diagonal
    mcmoe_compat: bool = False  # quantise as the release of MC-MoE does
    seed: int = 0  # of the random allocation
    grid: GridConfig = field(default_factory=GridConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    pmq: PmqConfig = field(default_factory=PmqConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    repair: RepairConfig = field(default_factory=RepairConfig)
    text: TextConfig = field(default_factory=TextConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        widths = parse_widths(self.widths)
        if not self.bits > 0:
            raise ConfigError(f"bits is {self.bits}; it must be above 0")
        if self.bytes is not None and self.bytes < 1:
            raise ConfigError(f"bytes is {self.bytes}; it must be at least 1 or null")
        for name in ("attention_bits", "shared_bits", "dense_bits"):
            value = getattr(self, name)
            if value not in (*WIDTHS, 16):
                known = ", ".join(f"{width:g}" for width in (*WIDTHS, 16))
                raise ConfigError(f"{name} is {value:g}; it must be one of {known}")
        if not self.damp > 0:
            raise ConfigError(f"damp is {self.damp}; it must be above 0")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {(1 << 32) - 1}")
        if self.mcmoe_compat and self.grid.group != 128:
            raise ConfigError(
                f"grid.group is {self.grid.group}, but mcmoe_compat quantises in groups of 128"
            )
        if self.granularity is not Granularity.expert and self.allocation in _BY_EXPERT:
            raise ConfigError(
                f"granularity is {self.granularity.name}, but allocation={self.allocation.name} "
                "ranks whole experts; use granularity=expert, or costs: fisher_*, fnorm2*"
            )
        if self.allocation in _RANKED and len(widths) < 2:
            raise ConfigError(
                f"widths is {self.widths!r}, one width; allocation={self.allocation.name} deals "
                "out at least two"
            )

    def width_list(self) -> tuple[float, ...]:
        """Return the widths that experts may get, ascending."""
        return parse_widths(self.widths)


_RANKED = (Allocation.frequency, Allocation.weight, Allocation.random)
_BY_EXPERT = (
    *_RANKED,
    Allocation.pmq_paper,
    Allocation.pmq_release,
    Allocation.hessian,
)
