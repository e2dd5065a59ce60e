"""Settings of `gatewise distil`, and the run that follows from them and from the teacher's."""

from dataclasses import dataclass, field, replace

from gatewise.parallel.errors import ConfigError
from gatewise.routers.ahead.config import AheadConfig, AheadKind, AheadWeights
from gatewise.training.config import OptimConfig, RunConfig, TrainConfig

__all__ = ["DistilConfig", "PregateSection", "student_config"]


@dataclass(kw_only=True, slots=True)
class PregateSection:
    """The part of the router's settings that distillation gives to the model."""

    ahead: AheadConfig = field(default_factory=lambda: AheadConfig(kind=AheadKind.gru))


@dataclass(kw_only=True, slots=True)
class DistilConfig:
    """Settings of the command."""

    teacher: str | None = None  # a run's folder, its checkpoints folder or one step
    steps: int = 400
    sequences: int = 16  # per step, over all ranks
    ranks: int | None = None  # None: as many as the teacher was trained on
    seed: int = 0
    log_every: int = 20
    router: PregateSection = field(default_factory=PregateSection)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, weight_decay=0.01))
    val_tokens: int | None = None  # at most so many validation targets; None: as the teacher's run
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "log_every", "ranks", "val_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if not self.router.ahead.learns:
            raise ConfigError(
                f"router.ahead.kind is {self.router.ahead.kind.name}, which has nothing to learn; "
                "distil gru or read_me"
            )
        if self.router.ahead.weights is AheadWeights.pregate:
            raise ConfigError(
                "router.ahead.weights is pregate, but a distilled pre-gate keeps the teacher's "
                "routers for the weights; set it to layer (both losses are reported)"
            )


def student_config(teacher: TrainConfig, settings: DistilConfig) -> TrainConfig:
    """Return the settings of the model with its pre-gate, checked.

    Raises:
        ConfigError: if the teacher cannot teach, or the ranks do not fit.
    """
    if not teacher.model.moe_layers():
        raise ConfigError(f"teacher is {settings.teacher}, a dense model; it has no router")
    if teacher.router.ahead.is_on:
        raise ConfigError(
            f"teacher is {settings.teacher}, which has a pre-gate already "
            f"({teacher.router.ahead.kind.name}); its own routers do not choose, give a model "
            "trained with router.ahead.kind=off"
        )
    try:  # what acts in training only would be refused beside a pre-gate, and is not needed
        router = replace(
            teacher.router,
            ahead=settings.router.ahead,
            bias_rate=0.0,
            expert_dropout=0.0,
            random_second=False,
        )
    except ValueError as error:
        raise ConfigError(f"teacher is {settings.teacher}, which cannot teach: {error}") from error
    ranks = settings.ranks or teacher.parallel.ranks
    expert = teacher.parallel.expert if ranks == teacher.parallel.ranks else 1
    parallel = replace(teacher.parallel, ranks=ranks, expert=expert, shard=1)
    return replace(
        teacher,
        name="distil",
        steps=settings.steps,
        seed=settings.seed,
        log_every=settings.log_every,
        router=router,
        parallel=parallel,
        batch=replace(teacher.batch, sequences=settings.sequences, micro=None),
        optim=settings.optim,
        evaluation=replace(
            teacher.evaluation, every=None, tokens=settings.val_tokens or teacher.evaluation.tokens
        ),
        run=settings.run,
        checkpoint=replace(teacher.checkpoint, load=None),
    )
