"""Settings of a training run: the whole tree that `gatewise train` composes and checks.

Every field has a default, so that `TrainConfig()` is a valid small run. Checks that need several
fields stand in `TrainConfig.__post_init__`; they run before any rank starts.
"""

from dataclasses import dataclass, field
from enum import Enum

from gatewise.moe.config import ModelConfig
from gatewise.parallel.config import ParallelConfig, divisors
from gatewise.parallel.errors import ConfigError
from gatewise.routers.ahead.config import Exchange
from gatewise.routers.config import BalanceScope, RouterConfig, Selector
from gatewise.training.deepspeed_config import DeepSpeedConfig, EngineKind, check_deepspeed
from gatewise.training.guard_config import (
    FaultConfig,
    NonfiniteConfig,
    ReplicasConfig,
    SpikesConfig,
    StragglersConfig,
    check_faults,
)
from gatewise.training.schedule_config import ScheduleConfig

__all__ = [
    "Artifacts",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "EngineKind",
    "EvaluationConfig",
    "OptimConfig",
    "Precision",
    "RunConfig",
    "Schedule",
    "Tokenizer",
    "TrainConfig",
    "WandbConfig",
    "WandbMode",
]


class Tokenizer(Enum):
    """How text becomes tokens."""

    bytes = "bytes"
    bpe = "bpe"


class Schedule(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    wsd = "wsd"  # warmup, stable, linear decay
    constant = "constant"


class Precision(Enum):
    """Type of the forward and backward arithmetic; master weights are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"  # for comparisons: `gatewise verify`
    auto = "auto"  # bf16 where the processor multiplies it natively, else fp32


class WandbMode(Enum):
    """Whether and how records go to Weights & Biases."""

    off = "off"
    auto = "auto"  # when the extra is installed: online with a key, offline without
    online = "online"
    offline = "offline"


class Artifacts(Enum):
    """How the last checkpoint of a run goes to Weights & Biases."""

    off = "off"
    reference = "reference"  # path and checksums; the files stay where they are
    upload = "upload"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where a run keeps its files."""

    dir: str | None = None  # None: runs/<name>/<time>


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text and how it is cut into training sequences."""

    path: str | None = None  # file, folder, glob, .gz, .jsonl, Megatron prefix; None: stdlib
    blend: str | None = None  # "weight prefix weight prefix ..." of Megatron token files
    hf: str | None = None  # a Hugging Face dataset: owner/name[:configuration], or a local folder
    hf_rows: int | None = None  # of data.hf, at most so many rows for training; None: all
    text_key: str = "text"  # field of a .jsonl line or dataset row
    tokenizer: Tokenizer = Tokenizer.bytes
    vocab_size: int = 4096  # of a BPE; bytes have 257 (256 and end of text)
    tokenizer_path: str | None = None  # a tokenizer.json to use instead of training one
    sequence_length: int = 256
    validation_every: int = 10  # every n-th file (or document) is validation
    cache: str | None = None  # folder of tokenised files; None: the user's cache folder

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ConfigError(
                f"data.sequence_length is {self.sequence_length}; it must be at least 2"
            )
        if self.validation_every < 2:
            raise ConfigError(
                f"data.validation_every is {self.validation_every}; it must be at least 2"
            )
        if self.hf_rows is not None and self.hf_rows < 1:
            raise ConfigError(f"data.hf_rows is {self.hf_rows}; it must be at least 1 or null")
        if self.tokenizer is Tokenizer.bpe and not 257 <= self.vocab_size <= 65536:
            raise ConfigError(
                f"data.vocab_size is {self.vocab_size}; a BPE needs from 257 (all bytes and "
                "end of text) to 65536"
            )
        given = [name for name in ("path", "blend", "hf") if getattr(self, name) is not None]
        if len(given) > 1:
            both = " and ".join(f"data.{name}" for name in given)
            raise ConfigError(f"{both} are {'both' if len(given) == 2 else 'all'} set; keep one")


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """Sequences per optimizer step."""

    sequences: int = 16  # over all ranks
    micro: int | None = None  # per rank and pass; None: all of a rank's share in one pass

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ConfigError(f"batch.sequences is {self.sequences}; it must be at least 1")
        if self.micro is not None and self.micro < 1:
            raise ConfigError(f"batch.micro is {self.micro}; it must be at least 1 or null")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 3e-3
    lr_min_ratio: float = 0.1  # final over peak learning rate
    schedule: Schedule = Schedule.cosine
    warmup: int = 50  # steps
    decay: float = 0.3  # wsd: share of the steps in the final decay
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only; norms and biases have none
    clip: float = 1.0  # largest gradient norm; 0 is off
    router_lr_ratio: float = 1.0  # of the router's learning rate
    embedding_lr_ratio: float = 1.0  # of the embedding's learning rate

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "router_lr_ratio", "embedding_lr_ratio"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"optim.{name} is {value}; it must be above 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"optim.{name} is {value}; it must be in [0, 1)")
        for name in ("warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"optim.{name} is {value}; it must be at least 0")
        for name in ("lr_min_ratio", "decay"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"optim.{name} is {value}; it must be in [0, 1]")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When state is saved and how much of it is kept."""

    every: int | None = None  # steps; None: only at the end
    keep_last: int = 2
    asynchronous: bool = True
    resume: bool = True  # go on from the newest complete checkpoint of run.dir
    load: str | None = None  # start from this checkpoint of another run
    verify: bool = False  # read every save back before older checkpoints are deleted
    max_failures: int = 0  # saves in a row that may fail before the run stops
    max_rollbacks: int = 3  # times that the run may go back to a checkpoint by itself

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError(f"checkpoint.every is {self.every}; it must be at least 1 or null")
        if self.keep_last < 1:
            raise ConfigError(f"checkpoint.keep_last is {self.keep_last}; it must be at least 1")
        for name in ("max_failures", "max_rollbacks"):
            value = getattr(self, name)
            if value < 0:
                raise ConfigError(f"checkpoint.{name} is {value}; it must be at least 0")


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation on the validation split."""

    every: int | None = None  # steps; None: only at the end
    tokens: int | None = None  # at most so many target tokens; None: the whole split
    stride: int | None = None  # new tokens per window; None: no overlap (the whole window)
    micro: int = 16  # windows per rank and pass

    def __post_init__(self) -> None:
        for name in ("every", "tokens", "stride", "micro"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation.{name} is {value}; it must be at least 1")


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases: used when its extra is installed, offline where there is no key."""

    mode: WandbMode = WandbMode.auto
    project: str = "gatewise"
    entity: str | None = None
    group: str | None = None  # runs that belong together, as those of a sweep
    job_type: str = "train"
    tags: str | None = None  # separated by commas
    max_keys: int = 1000  # numbers of a record at most; above, layers are left out evenly
    checkpoints: Artifacts = Artifacts.off  # the last checkpoint as an artifact
    finish_seconds: float = 60.0  # to wait at the end for a service that does not answer

    def __post_init__(self) -> None:
        if self.max_keys < 1:
            raise ConfigError(f"wandb.max_keys is {self.max_keys}; it must be at least 1")
        if not 0 < self.finish_seconds <= 3600:
            raise ConfigError(
                f"wandb.finish_seconds is {self.finish_seconds}; it must be above 0, at most 3600"
            )


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    name: str = "run"
    steps: int = 200
    seed: int = 0
    log_every: int = 10
    precision: Precision = Precision.auto
    recompute: bool = False  # activation checkpointing of every block
    deterministic: bool = False  # torch.use_deterministic_algorithms
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineKind = EngineKind.gatewise  # who sums gradients and updates weights
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    nonfinite: NonfiniteConfig = field(default_factory=NonfiniteConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    stragglers: StragglersConfig = field(default_factory=StragglersConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    faults: list[FaultConfig] = field(default_factory=list)  # [{step: 7, rank: 2, kind: kill}]

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps is {self.steps}; it must be at least 0")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {(1 << 32) - 1}")
        if self.log_every < 1:
            raise ConfigError(f"log_every is {self.log_every}; it must be at least 1")
        if self.model.num_experts:
            self.router.check(self.model.num_experts, self.model.top_k, causal=True)
        self._check_ahead()
        self._check_layout()
        self._check_schedule()
        if self.engine is EngineKind.deepspeed:
            check_deepspeed(self.parallel, plans_slices=self.schedule.profile is not None)
        check_faults(self.faults, ranks=self.parallel.ranks, steps=self.steps)
        stride = self.evaluation.stride
        if stride is not None and stride > self.data.sequence_length:
            raise ConfigError(
                f"evaluation.stride is {stride}; it must be at most data.sequence_length "
                f"({self.data.sequence_length})"
            )

    def embedding_rows(self, ids: int) -> int:
        """Return how many rows the embedding has for a tokenizer with so many ids.

        Raises:
            ConfigError: if `model.vocab_size` is less.
        """
        rows = self.model.vocab_size or ids
        if rows < ids:
            raise ConfigError(
                f"model.vocab_size is {rows} but the tokenizer has {ids} ids; set "
                "data.tokenizer_path to the model's own tokenizer, or model.vocab_size to null"
            )
        return rows

    def _check_ahead(self) -> None:
        ahead, factor = self.router.ahead, self.model.capacity.factor
        if ahead.is_on and not self.model.moe_layers():
            raise ConfigError(
                f"router.ahead.kind is {ahead.kind.name} but the model has no MoE layer; set it to "
                "off, or model.num_experts above 0"
            )
        if ahead.is_on and factor is not None and ahead.exchange is not Exchange.layer:
            raise ConfigError(
                f"model.capacity.factor is {factor}, but what is dropped is decided in the layers "
                f"and router.ahead.exchange={ahead.exchange.name} plans before them; set the "
                "factor to null or router.ahead.exchange=layer"
            )

    def _check_schedule(self) -> None:
        policy, profile = self.schedule.policy, self.schedule.profile
        if policy == "serial" and profile is None:
            return
        if not self.model.moe_layers():
            given = f"profile is {profile}" if policy == "serial" else f"policy is {policy}"
            raise ConfigError(
                f"schedule.{given} but the model has no MoE layer; set it to "
                f"{'null' if policy == 'serial' else 'serial'}, or model.num_experts above 0"
            )
        tensor = self.parallel.tensor
        share = max(1, self.batch.sequences * tensor // self.parallel.ranks)
        if policy == "whole_block":
            self._check_parts(self.batch.micro or share)
            return
        tokens = (self.batch.micro or share) * self.data.sequence_length // tensor
        for name, chunks in zip(("forward", "backward"), self.schedule.chunks, strict=True):
            if chunks > tokens:
                raise ConfigError(
                    f"schedule.chunks_{name} is {chunks}, more than the {tokens} tokens of a "
                    f"rank's micro-batch; choose from 1 to {tokens}"
                )

    def _check_parts(self, sequences: int) -> None:
        parts = self.schedule.parts
        if sequences % parts:
            raise ConfigError(
                f"schedule.chunks_forward is {parts}, which does not divide the {sequences} "
                "sequences of a rank's micro-batch; schedule.policy=whole_block cuts between "
                f"sequences: choose from {divisors(sequences)}"
            )
        if sequences < 2:
            raise ConfigError(
                "schedule.policy is whole_block, which cuts between sequences, and a rank's "
                "micro-batch has 1; raise batch.sequences or batch.micro"
            )
        for name in self.excludes_parts():
            raise ConfigError(
                f"schedule.policy is whole_block, which cannot have {name}; leave that out, "
                "or choose a policy of one layer, as fsmoe"
            )

    def excludes_parts(self) -> list[str]:
        """Return the settings with which parts of a micro-batch cannot travel side by side."""
        found = {
            "recompute": self.recompute,
            "parallel.tensor above 1": self.parallel.tensor > 1,
            "parallel.dispatch other than direct": self.parallel.dispatch != "direct",
            "router.ahead.kind": self.router.ahead.is_on,
            "model.clamped_experts": self.model.clamped_experts,
            "router.selector=soft": self.router.selector is Selector.soft,
        }
        return [name for name, is_set in found.items() if is_set]

    def feels_parts(self) -> bool:
        """Return whether a step's numbers depend on where a micro-batch is cut."""
        router = self.router
        losses = (router.importance_loss, router.load_loss, router.batch_entropy_loss)
        per_batch = router.balance_loss > 0 and router.balance_scope is BalanceScope.micro_batch
        return (
            self.model.capacity.factor is not None or router.competing or per_batch or any(losses)
        )

    def _check_layout(self) -> None:
        experts, tensor = self.model.num_experts, self.parallel.tensor
        ranks, what = self.parallel.ranks // tensor, "parallel.ranks"
        if tensor > 1:
            what += " / parallel.tensor"
            self._check_tensor()
        if experts and experts % self.parallel.expert:
            raise ConfigError(
                f"model.num_experts is {experts}, which parallel.expert "
                f"({self.parallel.expert}) does not divide; every rank holds equally many experts"
            )
        if self.model.clamped_experts and self.parallel.expert * self.parallel.expert_shard > 1:
            raise ConfigError(
                "model.clamped_experts is true, and such experts stay whole on each rank; set "
                "parallel.expert=1 and parallel.expert_shard=1"
            )
        width, shards = self.model.expert_width, self.parallel.expert_shard
        if experts and width % shards:
            possible = [n for n in divisors(width) if self.parallel.ranks % n == 0]
            raise ConfigError(
                f"model.expert_width is {width}, which parallel.expert_shard ({shards}) does not "
                f"divide; choose one of {possible}"
            )
        if ranks > self.batch.sequences:
            raise ConfigError(
                f"{what} is {ranks} but batch.sequences is {self.batch.sequences}; "
                "every rank needs at least one sequence: use fewer ranks or a larger batch"
            )
        if self.batch.sequences % ranks:
            raise ConfigError(
                f"batch.sequences is {self.batch.sequences}, which {what} ({ranks}) does not "
                f"divide; choose a multiple of {ranks}"
            )
        share = self.batch.sequences // ranks
        if self.batch.micro is not None and share % self.batch.micro:
            raise ConfigError(
                f"batch.micro is {self.batch.micro}, which does not divide a rank's share of the "
                f"batch ({share} sequences)"
            )

    def _check_tensor(self) -> None:
        """Check what attention split over ranks asks of the other settings."""
        tensor, model = self.parallel.tensor, self.model
        if not model.attention.plain:
            raise ConfigError(
                f"parallel.tensor is {tensor}, which splits plain heads only, and this model's "
                "attention has biases, sinks, a norm over all heads or latents; set "
                "parallel.tensor=1"
            )
        for name, value in (
            ("model.heads", model.heads),
            ("model.kv_heads", model.kv_heads or model.heads),
            ("data.sequence_length", self.data.sequence_length),
        ):
            if value % tensor:
                raise ConfigError(
                    f"{name} is {value}, which parallel.tensor ({tensor}) does not divide; choose "
                    f"a multiple of {tensor}, or parallel.tensor from {divisors(value)}"
                )
        if self.router.ahead.is_on:
            raise ConfigError(
                f"parallel.tensor is {tensor}, but a pre-gate needs whole sequences on a rank; set "
                "parallel.tensor=1 or router.ahead.kind=off"
            )
        if model.num_experts and self.router.selector is Selector.soft:
            raise ConfigError(
                f"parallel.tensor is {tensor}, but router.selector=soft mixes the tokens of whole "
                "sequences on a rank; set parallel.tensor=1 or choose another selector"
            )
