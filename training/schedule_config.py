"""Settings of the order in which the MoE layers compute and communicate."""

from dataclasses import dataclass

from gatewise.moe.planning.stated import ONE_DEGREE, STATED_POLICIES
from gatewise.parallel.errors import ConfigError

__all__ = ["POLICIES", "ScheduleConfig"]

# policies within one layer, and whole_block, which sends parts of a micro-batch side by side
POLICIES = ("auto", "serial", *STATED_POLICIES, "search", "whole_block")


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """How much of the communication hides behind computation; docs/schedule.md."""

    policy: str = "serial"  # auto chooses by costs
    profile: str | None = None  # file of costs, or "measure" them at the start; None: state chunks
    chunks_forward: int | None = None  # parts of a micro-batch's tokens; None: planned
    chunks_backward: int | None = None  # None: planned, or as many as forward
    max_chunks: int = 8  # most chunks that are planned
    refit: int | None = 20  # steps that must be off by 10 % to measure again; None: never
    trace: int | None = None  # step whose lanes every rank writes to trace/; None: none

    def __post_init__(self) -> None:
        for name in ("chunks_forward", "chunks_backward", "max_chunks", "refit", "trace"):
            value = getattr(self, name)
            if value is not None and value < 1:
                null = "" if name == "max_chunks" else " or null"
                raise ConfigError(f"schedule.{name} is {value}; it must be at least 1{null}")
        if self.policy not in POLICIES:
            raise ConfigError(
                f"schedule.policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}"
            )
        stated = self.chunks_forward is not None or self.chunks_backward is not None
        if self.policy == "serial" and stated and self.chunks != (1, 1):
            raise ConfigError(
                "schedule.policy is serial, which has 1 chunk; leave schedule.chunks_forward and "
                "chunks_backward out, or choose another policy"
            )
        if self.profile is not None and stated:
            raise ConfigError(
                "schedule.profile and schedule.chunks_forward or chunks_backward are both set; a "
                "profile plans the chunks, so keep one of them"
            )
        if self.policy == "whole_block":
            self._check_parts()
        elif self.profile is None and self.policy != "serial":
            self._check_stated()

    @property
    def measures(self) -> bool:
        """Whether the ranks measure the costs themselves before they plan."""
        return self.profile == "measure"

    @property
    def parts(self) -> int:
        """Stated parts of a micro-batch that travel side by side; a profile plans them."""
        return self.chunks_forward or 1 if self.policy == "whole_block" else 1

    @property
    def chunks(self) -> tuple[int, int]:
        """The stated numbers of chunks: forward, backward."""
        forward = self.chunks_forward or self.chunks_backward or 1
        return forward, self.chunks_backward or forward

    def _check_parts(self) -> None:
        forward, backward = self.chunks
        if self.profile is None and (self.chunks_forward is None or forward < 2):
            raise ConfigError(
                "schedule.policy is whole_block but neither schedule.profile nor the parts of a "
                "micro-batch that travel side by side are given; set schedule.profile=measure, or "
                "schedule.chunks_forward to 2 or more"
            )
        if forward != backward:
            raise ConfigError(
                f"schedule.chunks_backward is {backward} and chunks_forward {forward}; with "
                "schedule.policy=whole_block both passes have the same parts: leave one out"
            )

    def _check_stated(self) -> None:
        if self.policy not in STATED_POLICIES:
            raise ConfigError(
                f"schedule.policy is {self.policy}, which chooses by costs; give schedule.profile, "
                f"or a policy of {', '.join(STATED_POLICIES)} with schedule.chunks_forward"
            )
        if self.chunks_forward is None:
            raise ConfigError(
                f"schedule.policy is {self.policy} but neither schedule.profile nor "
                "schedule.chunks_forward is set; give one of them"
            )
        forward, backward = self.chunks
        if self.policy in ONE_DEGREE and forward != backward:
            raise ConfigError(
                f"schedule.chunks_backward is {backward} and chunks_forward {forward}; "
                f"schedule.policy={self.policy} has one number for both, fsmoe_no_iio has two"
            )
