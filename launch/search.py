"""The points of a sweep that Optuna chooses, each by the losses of those before it.

Its trials are kept in a journal in the sweep's folder, so that the same command goes on with them.
The sampler is seeded by the number of the trial: a search that was interrupted draws what it would
have drawn. Settings and ranges are part of a study's name; with others a new one begins.
"""

import hashlib
import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from gatewise.launch.points import Combination, part_swept
from gatewise.parallel.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["Search", "Trial", "check_optuna"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A point that Optuna chose."""

    number: int  # from 0
    combination: Combination
    is_told: bool  # whether its loss is known to Optuna


@dataclass(frozen=True, slots=True)
class _Range:
    """What a field may be: one of several texts, or a number within an interval."""

    texts: tuple[str, ...] = ()
    is_ordered: bool = False  # a text between two good ones is likely to be good
    low: float = 0.0  # whole numbers mean whole numbers only
    high: float = 0.0
    is_log: bool = False

    def edges(self) -> Sequence[str]:
        """Return the first and the last value, or all texts."""
        return self.texts or (repr(self.low), repr(self.high))

    def distribution(self) -> "BaseDistribution":
        """Return it in Optuna's terms."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.texts:
            last = len(self.texts) - 1
            return (
                IntDistribution(0, last) if self.is_ordered else CategoricalDistribution(self.texts)
            )
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.is_log)
        return FloatDistribution(self.low, self.high, log=self.is_log)

    def text(self, value: Any) -> str:
        """Return a value of a trial, whose type is Optuna's affair, as the command line has it."""
        if isinstance(value, str):
            return value
        return self.texts[value] if self.texts else repr(value)


class Search:
    """The trials of one study; `open` comes first.

    Args:
        overrides: the command line, with ranges, lists and intervals.
        draw: seed of what is chosen.

    Raises:
        ConfigError: for a sweep that Optuna cannot search.
    """

    def __init__(self, overrides: Sequence[str], *, draw: int) -> None:
        self._kept, swept = part_swept(overrides)
        self._draw = draw
        self._ranges: dict[str, _Range] = {}
        for override in swept:
            name = override.get_key_element()
            if name in self._ranges:
                raise ConfigError(f"{name} is swept twice; give it once")
            self._ranges[name] = _range(override)
        told = [text for text in self._kept if not text.startswith("run.dir=")]
        text = "\n".join([*sorted(told), *(str(override.input_line) for override in swept)])
        self._name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._study: Any = None  # of a package that need not be installed

    def ends(self) -> list[Combination]:
        """Return the first and the last value of each range, beside the others' first."""
        edges = {name: values.edges() for name, values in self._ranges.items()}
        first = {name: texts[0] for name, texts in edges.items()}
        found = [first, *({**first, name: texts[-1]} for name, texts in edges.items())]
        return [self._combination(values) for values in found]

    def open(self, file: Path) -> None:
        """Open the journal, which another start may have left."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name=self._name,
            load_if_exists=True,
        )

    def trials(self) -> list[Trial]:
        """Return all trials so far."""
        return [
            Trial(
                trial.number,
                self._combination(self._texts(trial.params)),
                trial.state.is_finished(),
            )
            for trial in self._study.get_trials(deepcopy=False)
            if trial.params.keys() == self._ranges.keys()  # not one that was never asked to its end
        ]

    def ask(self, at_once: int, *, most: int, without: Collection[int]) -> list[Trial]:
        """Return trials to run next: those that were begun, then new ones.

        Args:
            at_once: how many.
            most: trials of the whole search.
            without: numbers of trials that were tried already.
        """
        begun = [t for t in self.trials() if not t.is_told and t.number not in without]
        found = begun[:at_once]
        while len(found) < at_once and len(self.trials()) < most:
            found.append(self._new())
        return found

    def tell(self, trial: Trial, loss: float) -> None:
        """Let Optuna know what came out."""
        self._study.tell(trial.number, loss)

    def _new(self) -> Trial:
        from optuna.samplers import TPESampler

        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = TPESampler(seed=self._draw * 100_003 + number)
        spaces = {name: values.distribution() for name, values in self._ranges.items()}
        trial = self._study.ask(spaces)
        return Trial(trial.number, self._combination(self._texts(trial.params)), is_told=False)

    def _texts(self, params: dict[str, Any]) -> dict[str, str]:
        """Return values as the command line has them, in its order."""
        return {name: values.text(params[name]) for name, values in self._ranges.items()}

    def _combination(self, values: dict[str, str]) -> Combination:
        return values, [*self._kept, *(f"{name}={value}" for name, value in values.items())]


def check_optuna() -> None:
    """Raise `ConfigError` where the package is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "submit.trials is set but the package optuna is not installed; pip install -e "
            "'.[optuna]', or leave it out for the whole grid"
        )


def _range(override: Override) -> _Range:
    """Return the values that an argument allows."""
    sweep = override.value()
    if isinstance(sweep, ChoiceSweep | RangeSweep):
        texts = tuple(override.sweep_string_iterator())
        return _Range(texts=texts, is_ordered=isinstance(sweep, RangeSweep) and len(texts) > 1)
    if not isinstance(sweep, IntervalSweep) or sweep.start is None or sweep.end is None:
        raise ConfigError(
            f"{override.input_line!r} cannot be searched; use a list, range(...), "
            "interval(low,high) or tag(log,interval(low,high))"
        )
    is_log = "log" in sweep.tags
    if not sweep.start < sweep.end or (is_log and sweep.start <= 0):
        above = " above 0" if is_log else ""
        raise ConfigError(
            f"{override.input_line!r} is no interval; give a low end{above} and a higher one"
        )
    return _Range(low=sweep.start, high=sweep.end, is_log=is_log)
